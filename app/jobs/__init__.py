"""Durable jobs: DBOS workflows run by a worker process, the computing done in an engine process beside it.

`service` is what the command line and the pages use; `work.Work` is what a kind of job implements.
"""
