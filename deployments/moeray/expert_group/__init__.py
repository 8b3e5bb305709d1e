"""Expert group: a Serve replica that owns a slice of every layer's routed experts."""
