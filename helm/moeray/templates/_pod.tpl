{{/*
Pods of Ray: (root, group, pool ("" is the head), pod (settings over podDefaults), config).
Probes are our own. KubeRay's would call a worker ready that has a Serve proxy, and here none has: an ingress is ready when
it takes requests, every other pod when its raylet lives.
*/}}

{{- define "moeray.podTemplate" -}}
{{- $root := .root -}}{{- $pod := .pod -}}{{- $gpu := eq $pod.device "gpu" -}}
metadata:
  labels:
    {{- /* No version of the chart: a change of these labels would make KubeRay replace the whole cluster. */}}
    {{- include "moeray.rayLabels" $root | nindent 4 }}
    moeray.io/pool: {{ default "head" .pool }}
    {{- with .group }}
    moeray.io/group: {{ . }}
    {{- end }}
    {{- with $pod.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $pod.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "moeray.serviceAccount" $root }}
  automountServiceAccountToken: {{ and (not .pool) $root.Values.autoscaling.enabled }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ if .pool }}{{ add 30 (include "moeray.drainSeconds" .) }}{{ else }}60{{ end }}
  securityContext: {{- toYaml $pod.podSecurityContext | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $pod.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $pod.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $pod.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $tolerations := $pod.tolerations }}
  {{- if and $gpu (not $tolerations) }}{{- $tolerations = list (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}{{ end }}
  {{- with $tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "moeray.affinity" . }}
  affinity: {{- . | nindent 4 }}
  {{- end }}
  {{- with $pod.topologySpreadConstraints }}
  topologySpreadConstraints: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $fetches := eq (include "moeray.checkpointSource" $root) "fetch" }}
  {{- if or $fetches $pod.initContainers }}
  initContainers:
    {{- if $fetches }}{{ include "moeray.fetchContainer" . | nindent 4 }}{{ end }}
    {{- with $pod.initContainers }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  containers:
    - name: ray-{{ ternary "worker" "head" (not (empty .pool)) }}
      image: {{ include "moeray.image" (dict "root" $root "image" $pod.image "device" $pod.device) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- with $pod.resources }}
      resources: {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext: {{- toYaml $pod.securityContext | nindent 8 }}
      env: {{- include "moeray.env" . | nindent 8 }}
      ports: {{- include "moeray.ports" . | nindent 8 }}
      {{- include "moeray.probes" . | nindent 6 }}
      {{- if .pool }}
      lifecycle:
        preStop:
          exec:
            command: [python3, /opt/moeray/drain.py, {{ include "moeray.drainSeconds" . | quote }}]
      {{- end }}
      volumeMounts: {{- include "moeray.volumeMounts" . | nindent 8 }}
  volumes: {{- include "moeray.volumes" . | nindent 4 }}
{{- end -}}

{{- define "moeray.affinity" -}}
{{- $affinity := deepCopy .pod.affinity -}}
{{- if and .pool (ne .pod.spread "none") -}}
{{- $labels := dict "moeray.io/release" .root.Release.Name "moeray.io/pool" .pool -}}
{{- $term := dict "labelSelector" (dict "matchLabels" $labels) "topologyKey" "kubernetes.io/hostname" -}}
{{- $anti := default dict $affinity.podAntiAffinity -}}
{{- if eq .pod.spread "required" -}}
{{- $key := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $anti $key (append (default list (get $anti $key)) $term) -}}
{{- else -}}
{{- $key := "preferredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $anti $key (append (default list (get $anti $key)) (dict "weight" 100 "podAffinityTerm" $term)) -}}
{{- end -}}
{{- $_ := set $affinity "podAntiAffinity" $anti -}}
{{- end -}}
{{- if $affinity -}}{{- toYaml $affinity -}}{{- end -}}
{{- end -}}

{{- define "moeray.env" -}}
{{- $values := .root.Values -}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: HOME, value: /home/moeray}
- {name: MOERAY_STATE_DIR, value: /home/moeray/state}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Ray's workers give way to everything else unless told otherwise; ours are what the pod is for.
- {name: RAY_worker_niceness, value: "0"}
- name: MOERAY_REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ $values.redis.existingSecret }}, key: redis-password}}
{{- with $values.kvRedis.existingSecret }}
- name: MOERAY_KV_REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ . }}, key: redis-password}}
{{- end }}
{{- with .pod.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "moeray.ports" -}}
{{- if not .pool -}}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
# KubeRay makes a Service of the port with this name, and fails without it; no client of ours uses that Service.
- {name: serve, containerPort: {{ .config.ingress.http_port }}}
{{ end -}}
- {name: agent, containerPort: 52365}
- {name: metrics, containerPort: 8080}
{{- $first := include "moeray.metricsPort" .config }}
{{- if and .pool $first (include "moeray.metricsOn" .root) }}
{{- range $place := until (int .pod.processes) }}
- {name: moeray-{{ $place }}, containerPort: {{ add (int $first) $place }}}
{{- end }}
{{- end }}
{{- if eq .pool "ingress" }}
- {name: http, containerPort: {{ .config.ingress.http_port }}}
- {name: grpc, containerPort: {{ .config.ingress.grpc_port }}}
{{- end }}
{{- end -}}

{{- define "moeray.probes" -}}
{{- $raylet := "httpGet: {path: /api/local_raylet_healthz, port: agent}" -}}
startupProbe:
  {{ $raylet }}
  periodSeconds: 5
  failureThreshold: 60
livenessProbe:
  {{ $raylet }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  {{- if not .pool }}
  httpGet: {path: /api/gcs_healthz, port: dashboard}
  {{- else if ne .pool "ingress" }}
  {{ $raylet }}
  {{- else if .root.Values.tls.ingress.clientCaSecret }}
  tcpSocket: {port: http} # the kubelet has no certificate to show; an ingress that is not ready does not listen
  {{- else }}
  httpGet: {path: /ready, port: http, scheme: {{ ternary "HTTPS" "HTTP" (not (empty (include "moeray.ingressTlsSecret" .root))) }}}
  {{- end }}
  periodSeconds: {{ ternary 2 10 (eq .pool "ingress") }}
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}
