"""Tenants at the door: who asks, what it may take, what it took. The rules are in `moeray.tenancy`."""
