{{/* Names, labels and images; every other template takes them from here. */}}

{{- define "moeray.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "moeray.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: moeray
moeray.io/release: {{ .Release.Name }}
{{- end -}}

{{/* Labels of our own, by which everything selects: KubeRay writes app.kubernetes.io/* of its own on Ray's pods. */}}
{{- define "moeray.rayLabels" -}}
moeray.io/release: {{ .Release.Name }}
moeray.io/component: ray
{{- end -}}

{{- define "moeray.redisLabels" -}}
moeray.io/release: {{ .Release.Name }}
moeray.io/component: redis
{{- end -}}

{{- define "moeray.serviceAccount" -}}
{{- default (include "moeray.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{/* (root, own image settings, device) -> image reference */}}
{{- define "moeray.image" -}}
{{- $base := ternary .root.Values.gpuImage .root.Values.image (eq .device "gpu") -}}
{{- $image := mergeOverwrite (pick (deepCopy $base) "repository" "tag" "digest") (default dict .image) -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* URL of the Redis for state, with a database; the bundled one's if none is given. */}}
{{- define "moeray.redisUrl" -}}
{{- if .Values.redis.url -}}
{{- .Values.redis.url -}}
{{- else -}}
redis://{{ include "moeray.fullname" . }}-redis:6379/0
{{- end -}}
{{- end -}}

{{/* A port of a redis:// URL. */}}
{{- define "moeray.redisPort" -}}
{{- $host := (urlParse .).host -}}
{{- if contains ":" $host -}}{{- last (splitList ":" $host) -}}{{- else -}}6379{{- end -}}
{{- end -}}

{{- define "moeray.checkpointSource" -}}
{{- if and (eq .Values.checkpoint.source "none") .Values.checkpoint.uri -}}fetch{{- else -}}{{ .Values.checkpoint.source }}{{- end -}}
{{- end -}}

{{/* Secret with the certificate of the ingress; empty: no TLS. */}}
{{- define "moeray.ingressTlsSecret" -}}
{{- $tls := .Values.tls.ingress -}}
{{- if $tls.existingSecret -}}{{ $tls.existingSecret }}{{- else if $tls.certManager.enabled -}}{{ include "moeray.fullname" . }}-ingress-tls{{- end -}}
{{- end -}}

{{- define "moeray.clusterTlsSecret" -}}
{{- $tls := .Values.tls.cluster -}}
{{- if $tls.existingSecret -}}{{ $tls.existingSecret }}{{- else if $tls.certManager.enabled -}}{{ include "moeray.fullname" . }}-cluster-tls{{- end -}}
{{- end -}}
