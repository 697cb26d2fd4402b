"""Node init for a host that many slices share: marks, rules, names.

``vnet`` puts each packet's owner on the packet. ``netflow``, the package
beside it, keeps the records that say who sent what.
"""

__version__ = "0.1.0"
