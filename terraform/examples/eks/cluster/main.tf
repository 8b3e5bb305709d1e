# Everything below moeray on AWS: key, network, EKS, GPU pools, checkpoints, Redis. Apply this root first, then
# ../moeray.
#
#     terraform init -backend-config=bucket=STATE_BUCKET -backend-config=key=moeray/cluster -backend-config=region=REGION
#     TF_VAR_redis_password=$(openssl rand -hex 32) terraform apply -var-file=example.tfvars
#     terraform output -json install > ../moeray/cluster.auto.tfvars.json

terraform {
  required_version = ">= 1.11, < 2.0"

  # The state holds Redis' password: a bucket of its own, encrypted, that few may read.
  backend "s3" {
    encrypt      = true
    use_lockfile = true
  }

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region = var.region
  default_tags {
    tags = merge(var.tags, { moeray = var.name })
  }
}

module "encryption" {
  source = "../../../modules/encryption"
  name   = var.name
}

module "network" {
  source      = "../../../modules/network"
  name        = var.name
  cidr        = var.cidr
  zones       = var.zones
  egress      = var.egress
  kms_key_arn = module.encryption.kms_key_arn
}

module "cluster" {
  source               = "../../../modules/cluster-eks"
  name                 = var.name
  subnet_ids           = module.network.private_subnet_ids
  kms_key_arn          = module.encryption.kms_key_arn
  admin_role_arns      = var.admin_role_arns
  private_access_cidrs = var.private_access_cidrs
}

module "gpu_nodepool" {
  source   = "../../../modules/gpu-nodepool"
  for_each = var.pools

  name                    = each.key
  pool                    = each.key
  cluster_name            = module.cluster.name
  vpc_id                  = module.network.vpc_id
  subnet_ids              = [module.network.private_subnet_id_of_zone[each.value.zone]]
  security_group_id       = module.cluster.security_group_id
  node_role_arn           = module.cluster.node_role_arn
  kms_key_arn             = module.encryption.kms_key_arn
  instance_type           = each.value.instance_type
  gpus_per_node           = each.value.gpus_per_node
  num_nodes               = each.value.num_nodes
  purchase                = each.value.purchase
  capacity_reservation_id = each.value.capacity_reservation_id
  placement_group         = each.value.placement_group
  efa                     = each.value.efa
}

module "storage" {
  source       = "../../../modules/storage"
  name         = var.name
  cluster_name = module.cluster.name
  kms_key_arn  = module.encryption.kms_key_arn
}

module "redis" {
  source                 = "../../../modules/redis"
  name                   = var.name
  vpc_id                 = module.network.vpc_id
  subnet_ids             = module.network.private_subnet_ids
  client_security_groups = { nodes = module.cluster.security_group_id }
  kms_key_arn            = module.encryption.kms_key_arn
  password               = var.redis_password
  password_version       = var.redis_password_version
}
