variable "name" {
  description = "Name of the installation."
  type        = string
  default     = "moeray"
}

variable "region" {
  description = "AWS region."
  type        = string
}

variable "zones" {
  description = "Two or three availability zones of the region."
  type        = list(string)
}

variable "cidr" {
  description = "The VPC's private range."
  type        = string
  default     = "10.64.0.0/16"
}

variable "egress" {
  description = "`none`, `single-nat` or `nat-per-zone`."
  type        = string
  default     = "single-nat"
}

variable "admin_role_arns" {
  description = "Name -> IAM role that administers the cluster."
  type        = map(string)
}

variable "private_access_cidrs" {
  description = "Private ranges besides the nodes that may reach the API server; without one, only the VPC's own machines do."
  type        = list(string)
  default     = []
}

variable "pools" {
  description = "GPU pools, keyed `attention` and `experts`."
  type = map(object({
    instance_type           = string
    zone                    = string
    num_nodes               = object({ min = number, max = number, desired = optional(number) })
    gpus_per_node           = optional(number, 8)
    purchase                = optional(string, "on-demand")
    capacity_reservation_id = optional(string)
    placement_group         = optional(bool, false)
    efa                     = optional(bool, false)
  }))
  validation {
    condition     = length(setsubtract(keys(var.pools), ["attention", "experts"])) == 0
    error_message = "pools must be keyed attention and experts."
  }
  validation {
    condition     = alltrue([for pool in values(var.pools) : contains(var.zones, pool.zone)])
    error_message = "pools: every zone must be one of zones."
  }
}

variable "redis_password" {
  description = "Redis' password, as TF_VAR_redis_password."
  type        = string
  sensitive   = true
}

variable "redis_password_version" {
  description = "Raise it with every new password."
  type        = number
  default     = 1
}

variable "tags" {
  description = "Tags of everything."
  type        = map(string)
  default     = {}
}
