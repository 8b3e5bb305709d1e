variable "project_id" {
  description = "The Google Cloud project."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "project_id must be a project's id, such as my-project-123 (neither its number nor its title)."
  }
}

variable "cluster_name" {
  description = "The GKE cluster (output `name` of `cluster-gke`)."
  type        = string
  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$", var.cluster_name))
    error_message = "cluster_name must be the name of a cluster, neither an ARN nor an address."
  }
}

variable "region" {
  description = "Region of the cluster."
  type        = string
  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "region must be a region such as europe-west4, not a zone."
  }
}

variable "zone" {
  description = "The zone of this pool. GPUs, reservations and placement all are of one zone."
  type        = string
  validation {
    condition     = startswith(var.zone, "${var.region}-") && can(regex("-[a-z]$", var.zone))
    error_message = "zone must be a zone of the cluster's region, such as europe-west4-b."
  }
}

variable "name" {
  description = "Name of the pool."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,28}[a-z0-9]$", var.name))
    error_message = "name must be 2 to 30 characters: lower-case letters, digits and hyphens, a letter first, no hyphen last."
  }
}

variable "pool" {
  description = "What runs here: `attention` or `experts`. Becomes the node label moeray.io/pool."
  type        = string
  validation {
    condition     = contains(["attention", "experts"], var.pool)
    error_message = "pool must be attention or experts; the ingress runs on the cluster's CPU nodes."
  }
}

variable "node_service_account" {
  description = "Account of the nodes (output of `cluster-gke`)."
  type        = string
  validation {
    condition     = can(regex("^[^@]+@[^@]+\\.iam\\.gserviceaccount\\.com$", var.node_service_account))
    error_message = "node_service_account must be the e-mail address of a service account."
  }
}

variable "kms_key_id" {
  description = "Key for what is stored (module `encryption-gcp`)."
  type        = string
  validation {
    condition     = can(regex("^projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+$", var.kms_key_id))
    error_message = "kms_key_id must look like projects/P/locations/L/keyRings/R/cryptoKeys/K."
  }
}

variable "machine_type" {
  description = "GPU machine, such as a3-highgpu-8g."
  type        = string
  validation {
    condition     = can(regex("^(a[2-4]|g2|g4)-[a-z0-9-]+$", var.machine_type))
    error_message = "machine_type must be an accelerator-optimised machine (a2, a3, a4, g2, g4), such as a3-highgpu-8g."
  }
}

variable "gpu_type" {
  description = "GPU of the machine in Google's words, such as nvidia-h100-80gb or nvidia-h200-141gb."
  type        = string
  validation {
    condition     = can(regex("^nvidia-[a-z0-9-]+$", var.gpu_type))
    error_message = "gpu_type must be Google's name of the GPU, such as nvidia-h100-80gb."
  }
}

variable "gpus_per_node" {
  description = "GPUs of one node."
  type        = number
  default     = 8
  validation {
    condition     = contains([1, 2, 4, 8, 16], var.gpus_per_node)
    error_message = "gpus_per_node must be 1, 2, 4, 8 or 16."
  }
}

variable "num_nodes" {
  description = "Bounds of the pool; GKE's autoscaler moves between them."
  type = object({
    min = number
    max = number
  })
  validation {
    condition     = var.num_nodes.min >= 0 && var.num_nodes.max >= 1 && var.num_nodes.min <= var.num_nodes.max
    error_message = "num_nodes needs 0 <= min <= max and max >= 1."
  }
}

variable "purchase" {
  description = "How capacity is bought: `on-demand`, `spot` or `reservation`."
  type        = string
  default     = "on-demand"
  validation {
    condition     = contains(["on-demand", "spot", "reservation"], var.purchase)
    error_message = "purchase must be on-demand, spot or reservation."
  }
  validation {
    condition     = !(var.purchase == "spot" && var.pool == "attention")
    error_message = "purchase = spot is for experts only: an expert group may be taken at any instant, an attention shard takes its requests' KV cache with it."
  }
}

variable "reservation" {
  description = "Name of the reservation of `purchase = \"reservation\"`."
  type        = string
  default     = null
  validation {
    condition     = (var.purchase == "reservation") == (var.reservation != null)
    error_message = "reservation belongs to purchase = reservation, and only to it."
  }
}

variable "compact_placement" {
  description = "Put the nodes close together."
  type        = bool
  default     = false
}

variable "gpu_networks" {
  description = "Further networks for traffic between GPUs (GPUDirect), in the order of the cards: VPC and subnet of each."
  type        = list(object({ network = string, subnetwork = string }))
  default     = []
  validation {
    condition     = length(var.gpu_networks) <= 9
    error_message = "gpu_networks can be nine at most: a node has ten network interfaces."
  }
}

variable "disk_gib" {
  description = "Size of the boot disk, GiB."
  type        = number
  default     = 500
  validation {
    condition     = var.disk_gib >= 200 && var.disk_gib <= 65536
    error_message = "disk_gib must be from 200 (the GPU image alone takes tens of GiB) to 65536."
  }
}

variable "disk_type" {
  description = "Type of the boot disk."
  type        = string
  default     = "hyperdisk-balanced"
  validation {
    condition     = contains(["hyperdisk-balanced", "pd-balanced", "pd-ssd"], var.disk_type)
    error_message = "disk_type must be hyperdisk-balanced, pd-balanced or pd-ssd."
  }
}

variable "local_ssds" {
  description = "Local NVMe disks for images and pods' scratch, checkpoints with it; erased with the node. 16 for a3-highgpu-8g."
  type        = number
  default     = 0
  validation {
    condition     = var.local_ssds >= 0 && var.local_ssds <= 32
    error_message = "local_ssds must be from 0 to 32."
  }
}

variable "labels" {
  description = "More node labels."
  type        = map(string)
  default     = {}
  validation {
    condition     = !contains(keys(var.labels), "moeray.io/pool")
    error_message = "labels must not contain moeray.io/pool; it is made from `pool`."
  }
}
