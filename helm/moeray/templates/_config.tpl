{{/*
The configuration of the cluster: what follows from the rest of the values, and over it what `config` says.
A process asks Ray for one CPU, and each pod offers as many as it has room for processes: Ray then fills every pod.
*/}}

{{- define "moeray.device" -}}
{{- default (ternary "gpu" "cpu" (hasKey (dig "limits" dict .resources) "nvidia.com/gpu")) .device -}}
{{- end -}}

{{/* Name -> worker group that is enabled, over podDefaults; with its device, processes, and bounds (least, most). */}}
{{- define "moeray.groups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.workerGroups -}}
{{- if ne (toString (dig "enabled" true $group)) "false" -}}
{{- $full := mergeOverwrite (deepCopy $.Values.podDefaults) (deepCopy $group) -}}
{{- $_ := set $full "device" (include "moeray.device" $full) -}}
{{- $_ := set $full "processes" (int (default 1 $group.processesPerPod)) -}}
{{- $_ := set $full "least" (int (ternary $group.replicas $group.minReplicas (kindIs "invalid" $group.minReplicas))) -}}
{{- $_ := set $full "most" (int (ternary $group.replicas $group.maxReplicas (kindIs "invalid" $group.maxReplicas))) -}}
{{- if not (and (le $full.least (int $group.replicas)) (le (int $group.replicas) $full.most)) -}}
{{- fail (printf "workerGroups.%s: minReplicas %d, replicas %d, maxReplicas %d must not fall" $name $full.least (int $group.replicas) $full.most) -}}
{{- end -}}
{{- if and (eq $group.pool "ingress") (ne $full.processes 1) -}}
{{- fail (printf "workerGroups.%s.processesPerPod: a pod has one ingress, whose ports are the pod's" $name) -}}
{{- end -}}
{{- $_ := set $groups $name $full -}}
{{- end -}}
{{- end -}}
{{- toJson $groups -}}
{{- end -}}

{{/* (root, pool, groups) -> {pods' processes at the beginning, at most, GPUs of each} */}}
{{- define "moeray.pool" -}}
{{- $count := 0 -}}{{- $most := 0 -}}{{- $shares := list -}}
{{- range $name, $group := .groups -}}
{{- if eq $group.pool $.pool -}}
{{- $count = add $count (mul $group.replicas $group.processes) -}}
{{- $most = add $most (mul (ternary $group.most $group.replicas $.root.Values.autoscaling.enabled) $group.processes) -}}
{{- $gpus := 0 -}}
{{- if eq $group.device "gpu" -}}
{{- $gpus = int (dig "limits" "nvidia.com/gpu" 0 $group.resources) -}}
{{- if or (lt $gpus 1) (ne 0 (int (mod $gpus $group.processes))) -}}
{{- fail (printf "workerGroups.%s: %d GPUs (resources.limits.nvidia.com/gpu) are not the same for each of %d processesPerPod" $name $gpus (int $group.processes)) -}}
{{- end -}}
{{- end -}}
{{- $shares = append $shares (div $gpus $group.processes) -}}
{{- end -}}
{{- end -}}
{{- if gt (len (uniq $shares)) 1 -}}
{{- fail (printf "workerGroups: those of the pool %s have different GPUs per process: %s" $.pool (toJson $shares)) -}}
{{- end -}}
{{- toJson (dict "count" $count "most" $most "gpus" (default 0 (first $shares))) -}}
{{- end -}}

{{/* Whether somebody is to reach the processes' metrics. */}}
{{- define "moeray.metricsOn" -}}{{- if .Values.monitoring.podMonitor -}}true{{- end -}}{{- end -}}

{{/* The first of the ports at which the processes of a pod show them; "" where they show none. */}}
{{- define "moeray.metricsPort" -}}
{{- $port := int (dig "telemetry" "metrics_port" 9464 .) -}}{{- if $port -}}{{ $port }}{{- end -}}
{{- end -}}

{{/* The most processes that a pod has. */}}
{{- define "moeray.mostProcesses" -}}
{{- $most := 0 -}}
{{- range fromJson (include "moeray.groups" .) -}}{{- $most = max $most (int .processes) -}}{{- end -}}
{{- $most -}}
{{- end -}}

{{- define "moeray.derivedConfig" -}}
{{- $groups := fromJson (include "moeray.groups" .) -}}
{{- $derived := dict "redis" (dict "url" (include "moeray.redisUrl" .)) "tenants" (dict) -}}
{{- range $pool, $key := dict "ingress" "num_replicas" "attention" "num_shards" "experts" "num_groups" "engram" "num_servers" -}}
{{- $found := fromJson (include "moeray.pool" (dict "root" $ "pool" $pool "groups" $groups)) -}}
{{- $section := dict $key (int $found.count) "num_cpus" 1 "label_selector" (dict "pool" $pool) -}}
{{- if has $pool (list "attention" "experts") -}}{{- $_ := set $section "num_gpus" (int $found.gpus) -}}{{- end -}}
{{- $wanted := dig $pool $key (int $found.count) $.Values.config -}}
{{- if gt (int $wanted) (int $found.most) -}}
{{- fail (printf "config.%s.%s: %d processes do not fit into the pods of pool %s, which have room for %d" $pool $key (int $wanted) $pool (int $found.most)) -}}
{{- end -}}
{{- if or (ne $pool "engram") (gt (int $found.most) 0) -}}{{- $_ := set $derived $pool $section -}}{{- end -}}
{{- end -}}
{{- $_ := set $derived.ingress "host" "0.0.0.0" -}}
{{- if include "moeray.metricsOn" . -}}{{- $_ := set $derived "telemetry" (dict "metrics_host" "0.0.0.0") -}}{{- end -}}
{{- if ne (include "moeray.checkpointSource" .) "none" -}}{{- $_ := set $derived "model" .Values.checkpoint.mountPath -}}{{- end -}}
{{- if eq (dig "tenants" "auth" "required" .Values.config | toString) "required" -}}
{{- $_ := set $derived.tenants "secret_file" "/etc/moeray/tenants/cache-salt" -}}
{{- /* Redis has the records of all ingresses, and keeps them when a pod goes. */ -}}
{{- $_ := set $derived.tenants "usage" "redis" -}}
{{- if .Values.tenants.fileKey -}}{{- $_ := set $derived.tenants "file" (printf "/etc/moeray/tenants/%s" .Values.tenants.fileKey) -}}{{- end -}}
{{- end -}}
{{- with include "moeray.ingressTlsSecret" . -}}
{{- $tls := dict "cert_file" "/etc/moeray/ingress-tls/tls.crt" "key_file" "/etc/moeray/ingress-tls/tls.key" -}}
{{- if $.Values.tls.ingress.clientCaSecret -}}{{- $_ := set $tls "client_ca_file" "/etc/moeray/client-ca/ca.crt" -}}{{- end -}}
{{- $_ := set $derived.ingress "tls" $tls -}}
{{- end -}}
{{- if and .Values.tls.ingress.clientCaSecret (not (include "moeray.ingressTlsSecret" .)) -}}
{{- fail "tls.ingress.clientCaSecret: needs a certificate of the ingress, too (existingSecret or certManager)" -}}
{{- end -}}
{{- if include "moeray.clusterTlsSecret" . -}}
{{- $_ := set $derived "cluster_tls" (dict "cert_file" "/etc/moeray/cluster-tls/tls.crt" "key_file" "/etc/moeray/cluster-tls/tls.key" "ca_file" "/etc/moeray/cluster-tls/ca.crt") -}}
{{- end -}}
{{- toJson $derived -}}
{{- end -}}

{{/* The whole configuration, as JSON. The ports' defaults are written here because Services need them, too. */}}
{{- define "moeray.config" -}}
{{- $config := mergeOverwrite (fromJson (include "moeray.derivedConfig" .)) (deepCopy .Values.config) -}}
{{- $_ := set $config "ingress" (merge $config.ingress (dict "http_port" 8000 "grpc_port" 50051 "drain_s" 30)) -}}
{{- toJson $config -}}
{{- end -}}

{{/* moeray.app: what Serve leaves a replica that it stops, and as much again for Ray to notice. */}}
{{- define "moeray.drainSeconds" -}}
{{- if eq .pool "ingress" -}}{{ add 20 (ceil .config.ingress.drain_s) }}{{- else -}}150{{- end -}}
{{- end -}}
