# Everything below moeray on Google Cloud: key, network, GKE, GPU pools, checkpoints, Redis. Apply this root first,
# then ../moeray. Never validated: the google provider was not at hand where this was written.
#
#     terraform init -backend-config=bucket=STATE_BUCKET -backend-config=prefix=moeray/cluster
#     terraform apply -var-file=example.tfvars
#     terraform output -json install > ../moeray/cluster.auto.tfvars.json

terraform {
  required_version = ">= 1.11, < 2.0"

  # The state holds Redis' password: a bucket of its own, encrypted with a key of yours (-backend-config=kms_encryption_key=...), that few
  # may read.
  backend "gcs" {}

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.50"
    }
  }
}

provider "google" {
  project        = var.project_id
  region         = var.region
  default_labels = merge(var.labels, { moeray = var.name })
}

module "encryption" {
  source     = "../../../modules/encryption-gcp"
  name       = var.name
  project_id = var.project_id
  region     = var.region
}

module "network" {
  source     = "../../../modules/network-gcp"
  name       = var.name
  project_id = var.project_id
  region     = var.region
  egress     = var.egress
}

module "cluster" {
  source               = "../../../modules/cluster-gke"
  name                 = var.name
  project_id           = var.project_id
  region               = var.region
  network_id           = module.network.network_id
  subnetwork_id        = module.network.subnetwork_id
  kms_key_id           = module.encryption.kms_key_id
  private_access_cidrs = var.private_access_cidrs
}

module "gpu_nodepool" {
  source   = "../../../modules/gpu-nodepool-gke"
  for_each = var.pools

  name                 = each.key
  pool                 = each.key
  project_id           = var.project_id
  region               = var.region
  cluster_name         = module.cluster.name
  node_service_account = module.cluster.node_service_account
  kms_key_id           = module.encryption.kms_key_id
  zone                 = each.value.zone
  machine_type         = each.value.machine_type
  gpu_type             = each.value.gpu_type
  gpus_per_node        = each.value.gpus_per_node
  num_nodes            = each.value.num_nodes
  purchase             = each.value.purchase
  reservation          = each.value.reservation
  compact_placement    = each.value.compact_placement
  gpu_networks         = each.value.gpu_networks
  local_ssds           = each.value.local_ssds
}

module "storage" {
  source        = "../../../modules/storage-gcp"
  name          = var.name
  project_id    = var.project_id
  region        = var.region
  kms_key_id    = module.encryption.kms_key_id
  workload_pool = module.cluster.workload_pool
}

module "redis" {
  source     = "../../../modules/redis-gcp"
  name       = var.name
  project_id = var.project_id
  region     = var.region
  network_id = module.network.network_id
  kms_key_id = module.encryption.kms_key_id
}
