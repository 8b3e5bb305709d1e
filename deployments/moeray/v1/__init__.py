"""Generated from deployments/moeray/ingress/proto by `python -m moeray.ingress.generate`; do not edit."""
