"""The door for browsers and curl: pictures by URL, on the same admission, batchers and budget as gRPC's.

`door` listens and admits, `routes` is the table of what there is, with its OpenAPI, and `pictures` answers.
"""
