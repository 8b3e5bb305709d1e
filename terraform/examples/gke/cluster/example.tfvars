# An example, not a recommendation.
project_id = "my-project-123" # yours
region     = "europe-west4"
# private_access_cidrs = { vpn = "10.8.0.0/16" } # yours

pools = {
  attention = {
    machine_type = "a3-highgpu-8g"
    gpu_type     = "nvidia-h100-80gb"
    zone         = "europe-west4-b"
    num_nodes    = { min = 2, max = 4 }
    local_ssds   = 16
  }
  experts = {
    machine_type      = "a3-highgpu-8g"
    gpu_type          = "nvidia-h100-80gb"
    zone              = "europe-west4-b"
    num_nodes         = { min = 2, max = 8 }
    local_ssds        = 16
    compact_placement = true
  }
}
