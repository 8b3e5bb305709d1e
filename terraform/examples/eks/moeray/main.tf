# moeray on the cluster that ../cluster made. Never validated: the helm provider was not at hand where this was
# written.
#
# Before: KubeRay's operator and CRDs, the NVIDIA and EFA device plugins, and in the namespace the Secrets
# (docs/terraform.md).
#
#     terraform init -backend-config=bucket=STATE_BUCKET -backend-config=key=moeray/moeray -backend-config=region=REGION
#     terraform apply -var-file=example.tfvars

terraform {
  required_version = ">= 1.11, < 2.0"

  backend "s3" {
    encrypt      = true
    use_lockfile = true
  }

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
    helm = {
      source  = "hashicorp/helm"
      version = "~> 3.0"
    }
  }
}

provider "aws" {
  region = var.region
}

data "aws_eks_cluster" "this" {
  name = var.cluster_name
}

provider "helm" {
  kubernetes = {
    host                   = data.aws_eks_cluster.this.endpoint
    cluster_ca_certificate = base64decode(data.aws_eks_cluster.this.certificate_authority[0].data)
    # A token made for every run: none is kept in the state.
    exec = {
      api_version = "client.authentication.k8s.io/v1beta1"
      command     = "aws"
      args        = ["eks", "get-token", "--cluster-name", var.cluster_name, "--region", var.region]
    }
  }
}

module "moeray" {
  source         = "../../../modules/moeray"
  chart          = var.chart
  chart_version  = var.chart_version
  pools          = var.pools
  redis          = { url = var.redis_url, existing_secret = var.redis_secret }
  checkpoint_uri = "${var.checkpoint_uri}${var.model}"
  values         = [for file in var.values_files : file(file)]
}
