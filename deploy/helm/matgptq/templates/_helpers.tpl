{{/* Name of everything of this release; what belongs to a class appends the class. */}}
{{- define "matgptq.name" -}}
{{- if contains "matgptq" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-matgptq" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "matgptq.selector" -}}
app.kubernetes.io/name: matgptq
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "matgptq.labels" -}}
{{ include "matgptq.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The values of each class over the defaults, as JSON: {class: values}. */}}
{{- define "matgptq.classes" -}}
{{- $classes := dict }}
{{- range $class, $values := .Values.replicaClasses }}
{{- $_ := set $classes $class (mergeOverwrite (deepCopy $.Values.defaults) (deepCopy $values)) }}
{{- end }}
{{- toJson $classes }}
{{- end }}

{{/* Whether an init container brings the planes. */}}
{{- define "matgptq.fetches" -}}
{{- if or .Values.model.repository .Values.model.copy }}yes{{ end }}
{{- end }}

{{- define "matgptq.tenantsSecret" -}}
{{- if .Values.tenants.existingSecret }}{{ .Values.tenants.existingSecret }}{{ else if .Values.tenants.file }}{{ include "matgptq.name" . }}-tenants{{ end }}
{{- end }}

{{/* PromQL: requests waiting, and the share of budgets missed, of one class. */}}
{{- define "matgptq.query.waiting" -}}
sum(vllm:num_requests_waiting{namespace="{{ .namespace }}", service="{{ .service }}"})
{{- end }}
{{- define "matgptq.query.misses" -}}
sum(rate(matgptq_budget_outcomes_total{namespace="{{ .namespace }}", service="{{ .service }}", outcome="missed"}[5m])) / (sum(rate(matgptq_budget_outcomes_total{namespace="{{ .namespace }}", service="{{ .service }}"}[5m])) > 0) or vector(0)
{{- end }}

{{- define "matgptq.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
