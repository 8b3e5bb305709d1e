mock_provider "google" {}

variables {
  project_id           = "my-project-123"
  cluster_name         = "moeray"
  region               = "europe-west4"
  zone                 = "europe-west4-b"
  name                 = "experts"
  pool                 = "experts"
  node_service_account = "moeray-node@my-project-123.iam.gserviceaccount.com"
  kms_key_id           = "projects/my-project-123/locations/europe-west4/keyRings/moeray/cryptoKeys/data"
  machine_type         = "a3-highgpu-8g"
  gpu_type             = "nvidia-h100-80gb"
  num_nodes            = { min = 0, max = 4 }
}

run "worker_group_selects_and_tolerates_these_nodes" {
  command = plan
  assert {
    condition     = tomap(local.labels) == tomap(local.scheduling.nodeSelector)
    error_message = "the worker group's node selector must match the nodes' labels"
  }
  assert {
    condition     = local.scheduling.tolerations[0].key == local.gpu_taint && local.scheduling.resources["nvidia.com/gpu"] == "8"
    error_message = "the worker group must tolerate the nodes' taint and take all GPUs"
  }
  assert {
    condition     = local.reservation_kind == "NO_RESERVATION"
    error_message = "nothing reserved is used unasked"
  }
}

run "a_reservation_is_asked_for_by_name" {
  command = plan
  variables {
    purchase    = "reservation"
    reservation = "h100-block"
  }
  assert {
    condition     = local.reservation_kind == "SPECIFIC_RESERVATION"
    error_message = "only the named reservation"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    cluster_name         = "a/b"
    node_service_account = "default"
    project_id           = "P"
    zone                 = "us-central1-a"
    name                 = "x_y"
    pool                 = "ingress"
    kms_key_id           = "key"
    machine_type         = "n4-standard-16"
    gpu_type             = "H100"
    gpus_per_node        = 3
    num_nodes            = { min = 2, max = 1 }
    disk_gib             = 20
    disk_type            = "pd-standard"
    local_ssds           = 64
    labels               = { "moeray.io/pool" = "attention" }
  }
  expect_failures = [
    var.cluster_name, var.node_service_account,
    var.project_id, var.zone, var.name, var.pool, var.kms_key_id, var.machine_type, var.gpu_type, var.gpus_per_node, var.num_nodes,
    var.disk_gib, var.disk_type, var.local_ssds, var.labels,
  ]
}

run "attention_is_never_spot" {
  command = plan
  variables {
    pool     = "attention"
    purchase = "spot"
  }
  expect_failures = [var.purchase]
}

run "reservation_without_its_name_is_named" {
  command = plan
  variables { purchase = "reservation" }
  expect_failures = [var.reservation]
}

run "a_zone_in_place_of_the_region_and_too_many_networks_are_named" {
  command = plan
  variables {
    region       = "europe-west4-b"
    gpu_networks = [for _ in range(10) : { network = "n", subnetwork = "s" }]
  }
  expect_failures = [var.region, var.gpu_networks]
}
