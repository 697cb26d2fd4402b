"""Flow records of a host that many slices share: who sent what, to whom, when.

``netflow collect`` turns connection tracking into records with owners and
keeps them; every other command asks it over a local socket.
"""
