{{- define "embedmesh.name" -}}
{{- if contains "embedmesh" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-embedmesh" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "embedmesh.selector" -}}
app.kubernetes.io/name: embedmesh
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "embedmesh.labels" -}}
{{ include "embedmesh.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "embedmesh.image" -}}
image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* Of a pod. A Service named `embedmesh` would set EMBEDMESH_PORT to tcp://..., which is a setting of ours: no links. */}}
{{- define "embedmesh.pod" -}}
enableServiceLinks: false
automountServiceAccountToken: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile: { type: RuntimeDefault }
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "embedmesh.selector" . | nindent 8 }}
{{- with .values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "embedmesh.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
{{- end }}

{{/* Settings by their names. A list is separated by spaces, as the environment has it. */}}
{{- define "embedmesh.settings" -}}
{{- if .root.Values.catalogue }}
- name: EMBEDMESH_CATALOGUE
  value: /etc/embedmesh/catalogue.toml
{{- end }}
{{- if .root.Values.config }}
- name: EMBEDMESH_CONFIG
  value: /etc/embedmesh/embedmesh.toml
{{- end }}
{{- range $name, $value := .values.settings }}
- name: EMBEDMESH_{{ upper $name }}
  value: {{ if kindIs "slice" $value }}{{ join " " $value | quote }}{{ else }}{{ $value | toString | quote }}{{ end }}
{{- end }}
{{- end }}

{{- define "embedmesh.mounts" -}}
{{- if or .Values.catalogue .Values.config }}
- { name: catalogue, mountPath: /etc/embedmesh, readOnly: true }
{{- end }}
{{- if .Values.modelsClaim }}
- { name: models, mountPath: /models, readOnly: true }
{{- end }}
{{- end }}

{{- define "embedmesh.volumes" -}}
{{- if or .Values.catalogue .Values.config }}
- name: catalogue
  configMap: { name: {{ include "embedmesh.name" . }}-catalogue }
{{- end }}
{{- if .Values.modelsClaim }}
- name: models
  persistentVolumeClaim: { claimName: {{ .Values.modelsClaim }}, readOnly: true }
{{- end }}
{{- end }}

{{/* Of gateway and node alike, on the port `.port`: why each number is what it is. */}}
{{- define "embedmesh.slowIsNotStuck" -}}
# Two minutes for a start: the store may be verified, a model be read from a slow disk.
startupProbe:
  httpGet: { path: /health, port: {{ .port }} }
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 60
# Ends a process that answers nothing for three minutes, and never one that is only slow: /health asks neither store nor
# engine, 15 s is longer than a starved event loop was seen to take, and nine in a row would have to be late. Whatever
# breaks for good ends the process by itself.
livenessProbe:
  httpGet: { path: /health, port: {{ .port }} }
  periodSeconds: 20
  timeoutSeconds: 15
  failureThreshold: 9
{{- end }}
