variable "name" {
  description = "Name of the cluster."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "name must be 3 to 20 characters: lower-case letters, digits and hyphens, a letter first, no hyphen last (names of roles are made from it)."
  }
}

variable "kubernetes_version" {
  description = "Kubernetes minor version."
  type        = string
  default     = "1.33"
  validation {
    condition     = can(regex("^1\\.(29|3[0-9])$", var.kubernetes_version))
    error_message = "kubernetes_version must be a minor version from 1.29 on, such as \"1.33\" (in quotes)."
  }
}

variable "subnet_ids" {
  description = "Private subnets of at least two zones (module `network`)."
  type        = list(string)
  validation {
    condition     = length(distinct(var.subnet_ids)) >= 2
    error_message = "subnet_ids must name at least two subnets, in different zones."
  }
}

variable "kms_key_arn" {
  description = "Key for Kubernetes secrets, disks and logs (module `encryption`)."
  type        = string
  validation {
    condition     = can(regex("^arn:[a-z-]+:kms:", var.kms_key_arn))
    error_message = "kms_key_arn must be the ARN of a KMS key."
  }
}

variable "private_access_cidrs" {
  description = "Private ranges besides the nodes that may reach the API server, such as a VPN's. It always has a private address."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for cidr in var.private_access_cidrs : can(cidrnetmask(cidr)) && !endswith(cidr, "/0")])
    error_message = "private_access_cidrs must be IPv4 ranges; /0 would be everybody."
  }
}

variable "public_access_cidrs" {
  description = "Addresses that may reach the API server from the internet. Empty, as by default: it has no public endpoint."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for cidr in var.public_access_cidrs : can(cidrnetmask(cidr)) && can(regex("/(2[4-9]|3[0-2])$", cidr))])
    error_message = "public_access_cidrs must be IPv4 ranges of /24 or smaller: the API server is never open to everybody."
  }
}

variable "admin_role_arns" {
  description = "Name -> IAM role that administers the cluster. Without any, nobody can enter it."
  type        = map(string)
  validation {
    condition     = length(var.admin_role_arns) > 0 && alltrue([for arn in values(var.admin_role_arns) : can(regex("^arn:[a-z-]+:iam::[0-9]{12}:role/", arn))])
    error_message = "admin_role_arns must name at least one IAM role by its ARN; the creator of the cluster gets no rights otherwise."
  }
}

variable "system_nodes" {
  description = "CPU nodes for Ray's head, ingress, controller, operators."
  type = object({
    instance_types = optional(list(string), ["m7i.4xlarge"])
    min            = optional(number, 2)
    max            = optional(number, 6)
    disk_gib       = optional(number, 200)
  })
  default = {}
  validation {
    condition     = var.system_nodes.min >= 2 && var.system_nodes.max >= var.system_nodes.min
    error_message = "system_nodes needs 2 <= min <= max: with one node, its loss stops the ingress and the controller together."
  }
  validation {
    condition     = var.system_nodes.disk_gib >= 100
    error_message = "system_nodes.disk_gib must be at least 100: the image alone takes tens of GiB."
  }
  validation {
    condition     = length(var.system_nodes.instance_types) > 0 && alltrue([for type in var.system_nodes.instance_types : !can(regex("^(p|g|trn|inf)[0-9]", type))])
    error_message = "system_nodes.instance_types must be CPU instances; GPU nodes are made by the module gpu-nodepool."
  }
}

variable "log_days" {
  description = "Days that control plane logs are kept."
  type        = number
  default     = 365
  validation {
    condition     = contains([7, 14, 30, 60, 90, 180, 365, 731], var.log_days)
    error_message = "log_days must be 7, 14, 30, 60, 90, 180, 365 or 731 (what CloudWatch Logs offers)."
  }
}
