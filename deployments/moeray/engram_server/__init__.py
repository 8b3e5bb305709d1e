"""Engram row servers: each holds some hash columns of every table in its node's memory, for all shards."""
