"""Serving: one process that samples the requests of all its clients together.

scheduler: which rows share the next network call; engine: the thread that owns the models; jobs: the state of requests;
parameters: requests as clients send them; app: the HTTP interface; server: the process.
"""
