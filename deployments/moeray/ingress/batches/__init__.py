"""OpenAI's batch API: files of requests that are answered when there is room, below all other work."""
