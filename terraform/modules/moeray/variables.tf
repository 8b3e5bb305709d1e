variable "release_name" {
  description = "Name of the Helm release."
  type        = string
  default     = "moeray"
  validation {
    condition     = can(regex("^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", var.release_name))
    error_message = "release_name must be 1 to 30 lower-case letters, digits and hyphens, a letter first, no hyphen last."
  }
}

variable "namespace" {
  description = "Namespace of the release; it must exist, with its Secrets in it."
  type        = string
  default     = "moeray"
  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.namespace)) && !contains(["default", "kube-system"], var.namespace)
    error_message = "namespace must be a name of Kubernetes, and moeray's own (neither default nor kube-system)."
  }
}

variable "chart" {
  description = "The chart: a path, an oci:// address, or a name in `repository`."
  type        = string
  validation {
    condition     = length(var.chart) > 0
    error_message = "chart must be a path such as ../../../../helm/moeray, an oci:// address, or a name in repository."
  }
}

variable "repository" {
  description = "Helm repository of the chart; null for a path or an oci:// address."
  type        = string
  default     = null
  validation {
    condition     = var.repository == null ? true : startswith(var.repository, "https://") || startswith(var.repository, "oci://")
    error_message = "repository must begin with https:// or oci://."
  }
}

variable "chart_version" {
  description = "Exact version of the chart; null for a path, which has one of its own."
  type        = string
  default     = null
  validation {
    condition     = var.chart_version == null ? true : can(regex("^[0-9]+\\.[0-9]+\\.[0-9]+(-[0-9A-Za-z.-]+)?$", var.chart_version))
    error_message = "chart_version must be exact, such as 1.2.3: a range would install another chart tomorrow."
  }
  validation {
    condition     = (startswith(var.chart, ".") || startswith(var.chart, "/")) == (var.chart_version == null)
    error_message = "chart_version must be given unless chart is a path (beginning with . or /), and only then."
  }
}

variable "pools" {
  description = "Worker group -> output `scheduling` of its `gpu-nodepool`. Groups are keyed as in the chart: attention, experts."
  type = map(object({
    nodeSelector = map(string)
    tolerations  = list(object({ key = string, operator = string, value = string, effect = string }))
    resources    = map(string)
  }))
  default = {}
  validation {
    condition     = alltrue([for group, pool in var.pools : contains(["attention", "experts"], group) && pool.nodeSelector["moeray.io/pool"] == group])
    error_message = "pools must be keyed attention or experts, each with the scheduling of a node pool made for it."
  }
}

variable "redis" {
  description = "Redis for state: its URL without password, and the Kubernetes Secret that holds the password under `redis-password`."
  type = object({
    url             = string
    existing_secret = string
  })
  default = null
  validation {
    condition     = var.redis == null ? true : can(regex("^rediss://[^@]+$", var.redis.url))
    error_message = "redis.url must begin with rediss:// (TLS) and hold no user or password; that comes from existing_secret."
  }
  validation {
    condition     = var.redis == null ? true : length(var.redis.existing_secret) > 0
    error_message = "redis.existing_secret must name a Secret."
  }
}

variable "checkpoint_uri" {
  description = "Where the checkpoint lies (s3://, gs://); null leaves it to `values`."
  type        = string
  default     = null
  validation {
    condition     = var.checkpoint_uri == null ? true : can(regex("^(s3|gs)://[^/]+/.+$", var.checkpoint_uri))
    error_message = "checkpoint_uri must be s3://bucket/path or gs://bucket/path."
  }
}

variable "service_account" {
  description = "Service account of the pods; the one that the module `storage` lets read."
  type        = string
  default     = "moeray"
  validation {
    condition     = !contains(["default", ""], var.service_account)
    error_message = "service_account must be moeray's own, not default."
  }
}

variable "values" {
  description = "More values as YAML documents, as `file(\"values.yaml\")` gives them; later ones win over earlier and over what this module sets."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for document in var.values : can(keys(yamldecode(document)))])
    error_message = "values must be YAML documents that hold a map (the file's content, not its path)."
  }
  validation {
    condition     = alltrue([for document in var.values : !can(regex("(?im)^[ \\t-]*\"?(password|apikey|api_key|auth_token|token)\"?[ \\t]*:[ \\t]*[^ \\t\\r\\n{~]", document))])
    error_message = "values must hold no password, token or key: name an existing Secret instead (Terraform's state would keep it)."
  }
}

variable "timeout_s" {
  description = "Seconds until an install or upgrade that has not become ready is rolled back. Loading a large checkpoint takes its time."
  type        = number
  default     = 3600
  validation {
    condition     = var.timeout_s >= 300
    error_message = "timeout_s must be at least 300."
  }
}
