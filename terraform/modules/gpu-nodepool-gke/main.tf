# GPU nodes of one pool (attention or experts) as a GKE node pool, in one zone.
#
# `purchase` says how the capacity is paid: on demand, spot or a reservation. `compact_placement` puts the nodes close
# together, `gpu_networks` gives them further interfaces for traffic between GPUs. Nodes carry the label
# `moeray.io/pool` and the taint `nvidia.com/gpu`; output `scheduling` has the matching node selector and tolerations
# for the chart's worker group. GKE installs the driver and the device plugin.
#
# Never validated against the provider's schema: the google provider was not at hand where this was written. Its form,
# its references and the checks of its variables are tested.

resource "google_container_node_pool" "this" {
  #checkov:skip=CKV_GCP_68:the GPU driver is not signed by a key that secure boot knows
  project        = var.project_id
  name           = var.name
  cluster        = var.cluster_name
  location       = var.region
  node_locations = [var.zone]

  autoscaling {
    total_min_node_count = var.num_nodes.min
    total_max_node_count = var.num_nodes.max
    location_policy      = "ANY"
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  upgrade_settings {
    # GPUs to spare are rare: a node goes before its successor comes. The experts' copies lie on others.
    max_surge       = 0
    max_unavailable = 1
  }

  dynamic "placement_policy" {
    for_each = var.compact_placement ? [1] : []
    content {
      type = "COMPACT"
    }
  }

  network_config {
    enable_private_nodes = true
    dynamic "additional_node_network_configs" {
      for_each = var.gpu_networks
      content {
        network    = additional_node_network_configs.value.network
        subnetwork = additional_node_network_configs.value.subnetwork
      }
    }
  }

  node_config {
    machine_type      = var.machine_type
    spot              = var.purchase == "spot"
    disk_type         = var.disk_type
    disk_size_gb      = var.disk_gib
    boot_disk_kms_key = var.kms_key_id
    image_type        = "COS_CONTAINERD"
    service_account   = var.node_service_account
    oauth_scopes      = ["https://www.googleapis.com/auth/cloud-platform"]
    labels            = local.labels
    metadata          = { disable-legacy-endpoints = "true" }

    guest_accelerator {
      type  = var.gpu_type
      count = var.gpus_per_node
      gpu_driver_installation_config {
        gpu_driver_version = "DEFAULT"
      }
    }

    taint {
      key    = local.gpu_taint
      value  = "present"
      effect = "NO_SCHEDULE"
    }

    reservation_affinity {
      consume_reservation_type = local.reservation_kind
      key                      = var.purchase == "reservation" ? "compute.googleapis.com/reservation-name" : null
      values                   = var.purchase == "reservation" ? [var.reservation] : null
    }

    dynamic "ephemeral_storage_local_ssd_config" {
      for_each = var.local_ssds > 0 ? [var.local_ssds] : []
      content {
        local_ssd_count = ephemeral_storage_local_ssd_config.value
      }
    }

    gvnic {
      enabled = true
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      # Off only here: the driver's kernel module is not signed by a key that secure boot knows.
      enable_secure_boot          = false
      enable_integrity_monitoring = true
    }
  }
}
