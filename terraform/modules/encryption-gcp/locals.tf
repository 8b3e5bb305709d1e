locals {
  # The services that store something for this project; each acts as an agent of its own.
  agents = {
    kubernetes = "container-engine-robot"
    disks      = "compute-system"
    buckets    = "gs-project-accounts"
    redis      = "cloud-redis"
  }
}
