# What this module assumes of the chart's values; nothing else in it knows them.
locals {
  assumed_values = merge(
    { serviceAccount = { name = var.service_account } },
    length(var.pools) == 0 ? {} : {
      workerGroups = {
        for group, pool in var.pools : group => {
          nodeSelector = pool.nodeSelector
          tolerations  = pool.tolerations
          resources    = { limits = pool.resources }
        }
      }
    },
    var.redis == null ? {} : { redis = { url = var.redis.url, existingSecret = var.redis.existing_secret } },
    var.checkpoint_uri == null ? {} : { checkpoint = { uri = var.checkpoint_uri } },
  )
  values = concat([yamlencode(local.assumed_values)], var.values)
}
