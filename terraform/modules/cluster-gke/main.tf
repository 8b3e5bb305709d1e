# A regional GKE cluster whose API server and nodes have private addresses only, and the CPU nodes that carry Ray's
# head, ingress, controller and operators.
#
# Secrets and disks are encrypted with the given key; NetworkPolicies are enforced (Dataplane V2); pods get rights by
# Workload Identity, never from their node; nodes are shielded and run as an account that may write logs and metrics
# and pull images.
#
# Never validated against the provider's schema: the google provider was not at hand where this was written. Its form,
# its references and the checks of its variables are tested.

resource "google_service_account" "node" {
  project      = var.project_id
  account_id   = "${var.name}-node"
  display_name = "Nodes of ${var.name}"
}

resource "google_project_iam_member" "node" {
  for_each = local.node_roles
  project  = var.project_id
  role     = each.key
  member   = google_service_account.node.member
}

resource "google_container_cluster" "this" {
  project             = var.project_id
  name                = var.name
  location            = var.region
  network             = var.network_id
  subnetwork          = var.subnetwork_id
  deletion_protection = true

  # The cluster is born with a pool that cannot be configured well; it goes at once.
  initial_node_count       = 1
  remove_default_node_pool = true

  networking_mode             = "VPC_NATIVE"
  datapath_provider           = "ADVANCED_DATAPATH"
  enable_shielded_nodes       = true
  enable_intranode_visibility = true
  enable_legacy_abac          = false

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = true
    master_ipv4_cidr_block  = var.control_plane_cidr
  }

  master_authorized_networks_config {
    gcp_public_cidrs_access_enabled = false
    dynamic "cidr_blocks" {
      for_each = var.private_access_cidrs
      content {
        display_name = cidr_blocks.key
        cidr_block   = cidr_blocks.value
      }
    }
  }

  master_auth {
    client_certificate_config {
      issue_client_certificate = false
    }
  }

  database_encryption {
    state    = "ENCRYPTED"
    key_name = var.kms_key_id
  }

  workload_identity_config {
    workload_pool = local.workload_pool
  }

  release_channel {
    channel = var.release_channel
  }

  addons_config {
    gcs_fuse_csi_driver_config {
      enabled = true
    }
    gce_persistent_disk_csi_driver_config {
      enabled = true
    }
  }

  logging_config {
    enable_components = ["SYSTEM_COMPONENTS", "WORKLOADS", "APISERVER", "CONTROLLER_MANAGER", "SCHEDULER"]
  }

  monitoring_config {
    enable_components = ["SYSTEM_COMPONENTS"]
    managed_prometheus {
      enabled = true
    }
  }

  # The default pool lives for minutes, but it lives: the same rules hold for it.
  node_config {
    service_account   = google_service_account.node.email
    oauth_scopes      = ["https://www.googleapis.com/auth/cloud-platform"]
    boot_disk_kms_key = var.kms_key_id
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
  }

  lifecycle {
    ignore_changes = [node_config, initial_node_count]
  }

  depends_on = [google_project_iam_member.node]
}

resource "google_container_node_pool" "system" {
  project  = var.project_id
  name     = "system"
  cluster  = google_container_cluster.this.name
  location = var.region

  autoscaling {
    total_min_node_count = var.system_nodes.min
    total_max_node_count = var.system_nodes.max
    location_policy      = "BALANCED"
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  upgrade_settings {
    max_surge       = 1
    max_unavailable = 0
  }

  node_config {
    machine_type      = var.system_nodes.machine_type
    disk_type         = var.system_nodes.disk_type
    disk_size_gb      = var.system_nodes.disk_gib
    boot_disk_kms_key = var.kms_key_id
    image_type        = "COS_CONTAINERD"
    service_account   = google_service_account.node.email
    # Rights come from the account's roles; the scope only says that nothing narrows them further.
    oauth_scopes = ["https://www.googleapis.com/auth/cloud-platform"]
    labels       = { "moeray.io/pool" = "ingress" }
    metadata     = { disable-legacy-endpoints = "true" }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
  }
}
