mock_provider "google" {}

variables {
  name          = "moeray"
  project_id    = "my-project-123"
  region        = "europe-west4"
  network_id    = "projects/p/global/networks/n"
  subnetwork_id = "projects/p/regions/r/subnetworks/s"
  kms_key_id    = "projects/my-project-123/locations/europe-west4/keyRings/moeray/cryptoKeys/data"
}

run "nodes_have_no_right_to_the_projects_data" {
  command = plan
  assert {
    condition     = alltrue([for role in local.node_roles : can(regex("(artifactregistry.reader|logging|monitoring|stackdriver)", role))])
    error_message = "nodes write logs and metrics and pull images"
  }
  assert {
    condition     = local.workload_pool == "my-project-123.svc.id.goog"
    error_message = "Workload Identity's pool is the project's"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    network_id           = "default"
    subnetwork_id        = "default"
    name                 = "m"
    project_id           = "P"
    region               = "west"
    kms_key_id           = "key"
    control_plane_cidr   = "10.67.0.0/24"
    private_access_cidrs = { everybody = "0.0.0.0/0" }
    release_channel      = "RAPID"
    system_nodes         = { min = 1, machine_type = "a3-highgpu-8g", disk_gib = 20 }
  }
  expect_failures = [
    var.network_id, var.subnetwork_id,
    var.name, var.project_id, var.region, var.kms_key_id, var.control_plane_cidr, var.private_access_cidrs, var.release_channel,
    var.system_nodes,
  ]
}
