variable "region" {
  description = "AWS region (from ../cluster)."
  type        = string
}

variable "cluster_name" {
  description = "The EKS cluster (from ../cluster)."
  type        = string
}

variable "pools" {
  description = "Worker group -> node selector, tolerations, resources (from ../cluster)."
  type = map(object({
    nodeSelector = map(string)
    tolerations  = list(object({ key = string, operator = string, value = string, effect = string }))
    resources    = map(string)
  }))
}

variable "redis_url" {
  description = "Redis for state, without password (from ../cluster)."
  type        = string
}

variable "redis_secret" {
  description = "Kubernetes Secret in the namespace with Redis' password under `redis-password`."
  type        = string
  default     = "moeray-redis"
}

variable "checkpoint_uri" {
  description = "Where checkpoints lie (from ../cluster)."
  type        = string
}

variable "model" {
  description = "The checkpoint's directory under `checkpoint_uri`."
  type        = string
}

variable "chart" {
  description = "The chart."
  type        = string
  default     = "../../../../helm/moeray"
}

variable "chart_version" {
  description = "Its exact version, unless `chart` is a path."
  type        = string
  default     = null
}

variable "values_files" {
  description = "Files with more values of the chart."
  type        = list(string)
  default     = []
}
