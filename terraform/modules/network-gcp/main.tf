# A VPC with one private subnet for a GKE cluster, ranges for pods and services, a peering for Google's managed
# services (Redis), and on request a NAT. Nothing outside can open a connection: there is no firewall rule that lets
# one in, and nodes have no public address.
#
# Never validated against the provider's schema: the google provider was not at hand where this was written. Its form,
# its references and the checks of its variables are tested.

resource "google_compute_network" "this" {
  project                 = var.project_id
  name                    = var.name
  auto_create_subnetworks = false
  routing_mode            = "REGIONAL"
}

resource "google_compute_subnetwork" "nodes" {
  project                  = var.project_id
  name                     = "${var.name}-nodes"
  region                   = var.region
  network                  = google_compute_network.this.id
  ip_cidr_range            = var.cidrs.nodes
  private_ip_google_access = true

  secondary_ip_range {
    range_name    = "pods"
    ip_cidr_range = var.cidrs.pods
  }

  secondary_ip_range {
    range_name    = "services"
    ip_cidr_range = var.cidrs.services
  }

  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = var.flow_log_sampling
    metadata             = "INCLUDE_ALL_METADATA"
  }
}

# --- egress ---------------------------------------------------------------------------------------------------------

resource "google_compute_router" "this" {
  count   = var.egress == "nat" ? 1 : 0
  project = var.project_id
  name    = var.name
  region  = var.region
  network = google_compute_network.this.id
}

resource "google_compute_router_nat" "this" {
  count                              = var.egress == "nat" ? 1 : 0
  project                            = var.project_id
  name                               = var.name
  region                             = var.region
  router                             = google_compute_router.this[0].name
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "LIST_OF_SUBNETWORKS"

  subnetwork {
    name                    = google_compute_subnetwork.nodes.id
    source_ip_ranges_to_nat = ["ALL_IP_RANGES"]
  }

  log_config {
    enable = true
    filter = "ERRORS_ONLY"
  }
}

# --- Google's managed services --------------------------------------------------------------------------------------

resource "google_compute_global_address" "managed" {
  project       = var.project_id
  name          = "${var.name}-managed"
  purpose       = "VPC_PEERING"
  address_type  = "INTERNAL"
  network       = google_compute_network.this.id
  address       = local.managed_address
  prefix_length = local.managed_prefix
}

resource "google_service_networking_connection" "managed" {
  network                 = google_compute_network.this.id
  service                 = "servicenetworking.googleapis.com"
  reserved_peering_ranges = [google_compute_global_address.managed.name]
}
