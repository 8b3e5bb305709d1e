{{/* What a pod of Ray sees of the file system, and the init container that brings the checkpoint. */}}

{{- define "moeray.volumeMounts" -}}
{{- $root := .root -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/moeray}
- {name: shm, mountPath: /dev/shm}
- {name: scripts, mountPath: /opt/moeray, readOnly: true}
{{- if ne (include "moeray.checkpointSource" $root) "none" }}
- name: checkpoint
  mountPath: {{ $root.Values.checkpoint.mountPath }}
  readOnly: true
  {{- with $root.Values.checkpoint.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- range $name, $secret := fromJson (include "moeray.secretVolumes" .) }}
- {name: {{ $name }}, mountPath: /etc/moeray/{{ $name }}, readOnly: true}
{{- end }}
{{- with .pod.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "moeray.volumes" -}}
- {name: tmp, emptyDir: {}}
- {name: home, emptyDir: {}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .pod.shmSize }}}}
- {name: scripts, configMap: {name: {{ include "moeray.fullname" .root }}-scripts}}
{{- with include "moeray.checkpointVolume" .root }}
- name: checkpoint
  {{- . | nindent 2 }}
{{- end }}
{{- range $name, $secret := fromJson (include "moeray.secretVolumes" .) }}
- {name: {{ $name }}, secret: {secretName: {{ $secret }}, defaultMode: 0440}}
{{- end }}
{{- with .pod.volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Folder below /etc/moeray -> Secret. Each pod has those that its processes read, and no other. */}}
{{- define "moeray.secretVolumes" -}}
{{- $secrets := dict -}}
{{- with include "moeray.clusterTlsSecret" .root -}}{{- $_ := set $secrets "cluster-tls" . -}}{{- end -}}
{{- if eq .pool "ingress" -}}
{{- with include "moeray.ingressTlsSecret" .root -}}{{- $_ := set $secrets "ingress-tls" . -}}{{- end -}}
{{- with .root.Values.tls.ingress.clientCaSecret -}}{{- $_ := set $secrets "client-ca" . -}}{{- end -}}
{{- if eq (toString .config.tenants.auth) "required" -}}{{- $_ := set $secrets "tenants" .root.Values.tenants.existingSecret -}}{{- end -}}
{{- end -}}
{{- toJson $secrets -}}
{{- end -}}

{{- define "moeray.checkpointVolume" -}}
{{- $checkpoint := .Values.checkpoint -}}
{{- $source := include "moeray.checkpointSource" . -}}
{{- if eq $source "hostPath" -}}
hostPath: {path: {{ required "checkpoint.hostPath: name the directory" $checkpoint.hostPath }}, type: Directory}
{{- else if or (eq $source "claim") (and (eq $source "fetch") $checkpoint.claim) -}}
persistentVolumeClaim: {claimName: {{ required "checkpoint.claim: name the PersistentVolumeClaim" $checkpoint.claim }}{{ if eq $source "claim" }}, readOnly: true{{ end }}}
{{- else if and (eq $source "fetch") $checkpoint.fetch.storageClassName -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: {{ $checkpoint.fetch.storageClassName }}
      resources: {requests: {storage: {{ $checkpoint.fetch.size }}}}
{{- else if eq $source "fetch" -}}
emptyDir: {sizeLimit: {{ $checkpoint.fetch.size }}}
{{- end -}}
{{- end -}}

{{- define "moeray.fetchContainer" -}}
{{- $checkpoint := .root.Values.checkpoint -}}
- name: fetch-checkpoint
  image: {{ $checkpoint.fetch.image }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [sh, /opt/moeray/fetch.sh]
  args: [{{ required "checkpoint.uri: where is it to be fetched from?" $checkpoint.uri | quote }}, /checkpoint{{ with $checkpoint.subPath }}/{{ . }}{{ end }}, {{ $checkpoint.fetch.checksums | quote }}]
  env:
    - {name: HOME, value: /tmp}
    # KubeRay cleans Redis up in a copy of the head's pod, which needs no checkpoint.
    - {name: NODE_TYPE, valueFrom: {fieldRef: {fieldPath: "metadata.labels['ray.io/node-type']"}}}
    {{- with $checkpoint.fetch.env }}{{ toYaml . | nindent 4 }}{{ end }}
  resources: {{- toYaml $checkpoint.fetch.resources | nindent 4 }}
  securityContext: {{- toYaml .pod.securityContext | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: scripts, mountPath: /opt/moeray, readOnly: true}
    - {name: checkpoint, mountPath: /checkpoint}
{{- end -}}
