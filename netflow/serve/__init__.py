"""The questions over HTTP, for other people's programs: docs/api.md.

A process of its own, so that no web server is in the collector. It asks the
collector as whoever connected, and the collector decides what that may see.

params     what may be asked: query parameters -> a request of netflow.wire
models     what is answered, for the OpenAPI document
questions  the table of both: one line for each question
app        routes and errors
peers      who connected: the kernel's word for it, in each request
listen     sockets, the server, the metrics' own address
"""
