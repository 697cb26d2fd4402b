"""Flow records for other people's collectors: IPFIX (RFC 7011), biflows as in RFC 5103.

elements   the information elements that are used, and the templates made of them
records    columns of records -> data records, by template
names      which slice name to tell of when
session    messages of one transport session: templates, sequence numbers
transport  UDP and TCP, and how far a receiver has acknowledged
position   how far the export has come, kept on disk
export     the process: asks the collector, encodes, sends, remembers

It asks the collector for records after a position (netflow.history.after) and
is no part of it: whatever happens here, collecting goes on.
"""
