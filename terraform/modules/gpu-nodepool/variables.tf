variable "cluster_name" {
  description = "The EKS cluster (output `name` of `cluster-eks`)."
  type        = string
  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$", var.cluster_name))
    error_message = "cluster_name must be the name of a cluster, neither an ARN nor an address."
  }
}

variable "name" {
  description = "Name of the pool; with the cluster's name, that of its node group."
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

variable "vpc_id" {
  description = "The VPC (for EFA's security group)."
  type        = string
  validation {
    condition     = can(regex("^vpc-", var.vpc_id))
    error_message = "vpc_id must be a VPC's id (vpc-...)."
  }
}

variable "subnet_ids" {
  description = "Private subnets. Exactly one for a pool with a placement group, EFA or reserved capacity."
  type        = list(string)
  validation {
    condition     = length(var.subnet_ids) >= 1 && alltrue([for id in var.subnet_ids : startswith(id, "subnet-")])
    error_message = "subnet_ids must name at least one subnet (subnet-...)."
  }
  validation {
    condition     = length(var.subnet_ids) == 1 || !(var.placement_group || var.efa || contains(["reservation", "capacity-block"], var.purchase))
    error_message = "subnet_ids must name exactly one subnet: a placement group, EFA and reserved capacity each lie in one zone."
  }
}

variable "security_group_id" {
  description = "The cluster's security group (output `security_group_id` of `cluster-eks`)."
  type        = string
  validation {
    condition     = can(regex("^sg-", var.security_group_id))
    error_message = "security_group_id must be a security group's id (sg-...)."
  }
}

variable "node_role_arn" {
  description = "Role of the nodes (output `node_role_arn` of `cluster-eks`)."
  type        = string
  validation {
    condition     = can(regex("^arn:[a-z-]+:iam::[0-9]{12}:role/", var.node_role_arn))
    error_message = "node_role_arn must be the ARN of an IAM role."
  }
}

variable "kms_key_arn" {
  description = "Key for the disks (module `encryption`)."
  type        = string
  validation {
    condition     = can(regex("^arn:[a-z-]+:kms:", var.kms_key_arn))
    error_message = "kms_key_arn must be the ARN of a KMS key."
  }
}

variable "instance_type" {
  description = "GPU instance type, such as p5.48xlarge."
  type        = string
  validation {
    condition     = can(regex("^(p[4-9]|g[4-9])[a-z0-9-]*\\.[a-z0-9]+$", var.instance_type))
    error_message = "instance_type must be a GPU instance of the p or g families from p4 and g4 on, such as p5.48xlarge."
  }
}

variable "gpus_per_node" {
  description = "GPUs of one node; an autoscaler must know it while the pool is empty."
  type        = number
  default     = 8
  validation {
    condition     = contains([1, 2, 4, 8], var.gpus_per_node)
    error_message = "gpus_per_node must be 1, 2, 4 or 8."
  }
}

variable "num_nodes" {
  description = "Bounds of the pool, and how many nodes it starts with (default: min)."
  type = object({
    min     = number
    max     = number
    desired = optional(number)
  })
  validation {
    condition     = var.num_nodes.min >= 0 && var.num_nodes.max >= 1 && var.num_nodes.min <= var.num_nodes.max
    error_message = "num_nodes needs 0 <= min <= max and max >= 1."
  }
  validation {
    condition     = var.num_nodes.desired == null ? true : var.num_nodes.desired >= var.num_nodes.min && var.num_nodes.desired <= var.num_nodes.max
    error_message = "num_nodes.desired must lie between min and max."
  }
}

variable "purchase" {
  description = "How capacity is bought: `on-demand`, `spot`, `reservation` (on-demand capacity reservation) or `capacity-block`."
  type        = string
  default     = "on-demand"
  validation {
    condition     = contains(["on-demand", "spot", "reservation", "capacity-block"], var.purchase)
    error_message = "purchase must be on-demand, spot, reservation or capacity-block."
  }
  validation {
    condition     = !(var.purchase == "spot" && var.pool == "attention")
    error_message = "purchase = spot is for experts only: an expert group may be taken at any instant, an attention shard takes its requests' KV cache with it."
  }
}

variable "capacity_reservation_id" {
  description = "The reservation (cr-...) of `purchase = \"reservation\"` or `\"capacity-block\"`."
  type        = string
  default     = null
  validation {
    condition     = var.capacity_reservation_id == null ? true : can(regex("^cr-[0-9a-f]+$", var.capacity_reservation_id))
    error_message = "capacity_reservation_id must look like cr-0123456789abcdef0."
  }
  validation {
    condition     = contains(["reservation", "capacity-block"], var.purchase) == (var.capacity_reservation_id != null)
    error_message = "capacity_reservation_id belongs to purchase = reservation or capacity-block, and only to them."
  }
}

variable "placement_group" {
  description = "Put the nodes close together (strategy `cluster`)."
  type        = bool
  default     = false
}

variable "efa" {
  description = "Give every network card an EFA interface."
  type        = bool
  default     = false
}

variable "efa_interfaces" {
  description = "EFA interfaces of a node, where the instance type is none of those that this module knows."
  type        = number
  default     = null
  validation {
    condition     = var.efa_interfaces == null ? true : var.efa && var.efa_interfaces >= 1 && var.efa_interfaces <= 32
    error_message = "efa_interfaces must be from 1 to 32, and needs efa = true."
  }
  validation {
    condition     = !var.efa || var.efa_interfaces != null || contains(keys(local.efa_cards), var.instance_type)
    error_message = "efa_interfaces must be given: how many EFA interfaces this instance type has is not known here."
  }
}

variable "disk_gib" {
  description = "Size of the root disk, GiB."
  type        = number
  default     = 500
  validation {
    condition     = var.disk_gib >= 200 && var.disk_gib <= 16384
    error_message = "disk_gib must be from 200 (the GPU image alone takes tens of GiB) to 16384."
  }
}

variable "local_nvme" {
  description = "Join the instance's NVMe disks (RAID 0) and keep images and pods' scratch there, checkpoints with it. They are erased with the node and encrypted by the hardware."
  type        = bool
  default     = true
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
