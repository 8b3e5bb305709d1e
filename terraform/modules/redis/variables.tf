variable "name" {
  description = "Name of the installation."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,28}[a-z0-9]$", var.name)) && !can(regex("--", var.name))
    error_message = "name must be 3 to 30 characters: lower-case letters, digits and single hyphens, a letter first, no hyphen last."
  }
}

variable "use" {
  description = "`state`: nothing is ever evicted, snapshots for a week. `cache`: the least recently used goes."
  type        = string
  default     = "state"
  validation {
    condition     = contains(["state", "cache"], var.use)
    error_message = "use must be state or cache; one instance cannot be both."
  }
}

variable "vpc_id" {
  description = "The VPC."
  type        = string
  validation {
    condition     = can(regex("^vpc-", var.vpc_id))
    error_message = "vpc_id must be a VPC's id (vpc-...)."
  }
}

variable "subnet_ids" {
  description = "Private subnets, of two zones where there is a replica."
  type        = list(string)
  validation {
    condition     = length(distinct(var.subnet_ids)) >= (var.num_replicas > 0 ? 2 : 1)
    error_message = "subnet_ids must name two subnets where there is a replica: it takes over from another zone."
  }
}

variable "client_security_groups" {
  description = "Name -> security group that may connect."
  type        = map(string)
  validation {
    condition     = length(var.client_security_groups) > 0
    error_message = "client_security_groups must name at least one group; nobody could connect."
  }
}

variable "kms_key_arn" {
  description = "Key for data, snapshots and the password (module `encryption`)."
  type        = string
  validation {
    condition     = can(regex("^arn:[a-z-]+:kms:", var.kms_key_arn))
    error_message = "kms_key_arn must be the ARN of a KMS key."
  }
}

variable "node_type" {
  description = "Instance type."
  type        = string
  default     = "cache.m7g.large"
  validation {
    condition     = can(regex("^cache\\.[a-z0-9]+\\.[a-z0-9]+$", var.node_type))
    error_message = "node_type must be an ElastiCache type such as cache.m7g.large."
  }
}

variable "num_replicas" {
  description = "Replicas beside the primary."
  type        = number
  default     = 1
  validation {
    condition     = var.num_replicas >= 0 && var.num_replicas <= 5
    error_message = "num_replicas must be from 0 to 5."
  }
  validation {
    condition     = var.use == "cache" || var.num_replicas >= 1
    error_message = "num_replicas must be at least 1 for use = state: one node's loss would lose the cluster's state."
  }
}

variable "password" {
  description = "Redis' password (AUTH token); give it as TF_VAR_..., from a password store. It is in the state, see docs/terraform.md."
  type        = string
  sensitive   = true
  validation {
    condition     = length(var.password) >= 32 && length(var.password) <= 128 && can(regex("^[A-Za-z0-9]+$", var.password))
    error_message = "password must be 32 to 128 letters and digits, such as `openssl rand -hex 32` makes."
  }
}

variable "password_version" {
  description = "Raise it when the password changes: it is never read back, so a change of the password alone would not be seen by Secrets Manager."
  type        = number
  default     = 1
  validation {
    condition     = var.password_version >= 1 && floor(var.password_version) == var.password_version
    error_message = "password_version must be a whole number from 1 on."
  }
}
