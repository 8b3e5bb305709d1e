# moeray on the cluster that ../cluster made. Never validated: neither provider was at hand where this was written.
#
# Before: KubeRay's operator and CRDs, and in the namespace the Secrets (docs/terraform.md).
#
#     terraform init -backend-config=bucket=STATE_BUCKET -backend-config=prefix=moeray/moeray
#     terraform apply -var-file=example.tfvars

terraform {
  required_version = ">= 1.11, < 2.0"

  backend "gcs" {}

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.50"
    }
    helm = {
      source  = "hashicorp/helm"
      version = "~> 3.0"
    }
  }
}

provider "google" {
  project = var.project_id
  region  = var.region
}

data "google_container_cluster" "this" {
  name     = var.cluster_name
  location = var.region
}

provider "helm" {
  kubernetes = {
    host                   = "https://${data.google_container_cluster.this.private_cluster_config[0].private_endpoint}"
    cluster_ca_certificate = base64decode(data.google_container_cluster.this.master_auth[0].cluster_ca_certificate)
    # A token made for every run: none is kept in the state.
    exec = {
      api_version = "client.authentication.k8s.io/v1beta1"
      command     = "gke-gcloud-auth-plugin"
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
