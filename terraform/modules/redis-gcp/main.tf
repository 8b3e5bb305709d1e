# Redis outside the cluster: Ray's fault tolerance and the controller's state (`use = "state"`), or a cache (`use =
# "cache"`).
#
# The two want opposite things when memory is full: state must never be thrown away, a cache always. Hence one
# instance for each. It has a private address, TLS, a password that Memorystore makes, and the given key. An operator
# brings password and certificate authority into the cluster as a Kubernetes Secret; the chart takes its name and
# never the password.
#
# Never validated against the provider's schema: the google provider was not at hand where this was written. Its form,
# its references and the checks of its variables are tested.

resource "google_redis_instance" "this" {
  project        = var.project_id
  name           = "${var.name}-${var.use}"
  region         = var.region
  tier           = var.highly_available ? "STANDARD_HA" : "BASIC"
  memory_size_gb = var.memory_gib
  redis_version  = "REDIS_7_2"
  redis_configs  = { maxmemory-policy = local.eviction }

  authorized_network      = var.network_id
  connect_mode            = "PRIVATE_SERVICE_ACCESS"
  auth_enabled            = true
  transit_encryption_mode = "SERVER_AUTHENTICATION"
  customer_managed_key    = var.kms_key_id

  persistence_config {
    # Losing a cache costs time; losing state costs what tenants were promised.
    persistence_mode    = var.use == "state" ? "RDB" : "DISABLED"
    rdb_snapshot_period = var.use == "state" ? "ONE_HOUR" : null
  }
}
