"""The controller: one named actor that knows who is in the cluster."""
