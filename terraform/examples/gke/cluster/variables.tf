variable "name" {
  description = "Name of the installation."
  type        = string
  default     = "moeray"
}

variable "project_id" {
  description = "The Google Cloud project."
  type        = string
}

variable "region" {
  description = "Region."
  type        = string
}

variable "egress" {
  description = "`none` or `nat`."
  type        = string
  default     = "nat"
}

variable "private_access_cidrs" {
  description = "Name -> private range besides the nodes that may reach the API server."
  type        = map(string)
  default     = {}
}

variable "pools" {
  description = "GPU pools, keyed `attention` and `experts`."
  type = map(object({
    machine_type      = string
    gpu_type          = string
    zone              = string
    num_nodes         = object({ min = number, max = number })
    gpus_per_node     = optional(number, 8)
    purchase          = optional(string, "on-demand")
    reservation       = optional(string)
    compact_placement = optional(bool, false)
    gpu_networks      = optional(list(object({ network = string, subnetwork = string })), [])
    local_ssds        = optional(number, 0)
  }))
  validation {
    condition     = length(setsubtract(keys(var.pools), ["attention", "experts"])) == 0
    error_message = "pools must be keyed attention and experts."
  }
}

variable "labels" {
  description = "Labels of everything."
  type        = map(string)
  default     = {}
}
