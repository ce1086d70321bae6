"""What JobSet's API accepts, as a strict JSON schema.

The types come from kubeflow-trainer-api, which is generated from the API's own Go types (JobSet, Job, Pod); a cluster
drops or refuses a field that it does not know, so here a misspelt one is an error.
"""

from __future__ import annotations

from typing import Any

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

# Classes of the generated code that wrap a plain value, and what that value looks like in YAML.
PLAIN = {
    "IoK8sApimachineryPkgApiResourceQuantity": {"type": ["string", "number"]},
    "IoK8sApimachineryPkgUtilIntstrIntOrString": {"type": ["string", "integer"]},
}

# Enumerations that the API declares and the generated code leaves as text.
CHOICES = {
    ("JobsetV1alpha2FailurePolicy", "restartStrategy"): ["Recreate", "BlockingRecreate", "InPlaceRestart"],
    ("JobsetV1alpha2FailurePolicyRule", "action"): ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"],
    ("IoK8sApiBatchV1JobSpec", "completionMode"): ["NonIndexed", "Indexed"],
    ("IoK8sApiBatchV1PodFailurePolicyRule", "action"): ["FailIndex", "FailJob", "Ignore", "Count"],
    ("IoK8sApiBatchV1PodFailurePolicyOnExitCodesRequirement", "operator"): ["In", "NotIn"],
    ("IoK8sApiCoreV1PodSpec", "restartPolicy"): ["Always", "OnFailure", "Never"],
}


def jobset_schema() -> dict[str, Any]:
    """The schema; `required` is what the API declares, and additional properties are refused everywhere."""
    schema = JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
    kinds = schema["$defs"]
    kinds.update({name: plain for name, plain in PLAIN.items() if name in kinds})
    for (kind, field), choices in CHOICES.items():
        kinds[kind]["properties"][field] = {"enum": choices}
    for kind in (schema, *kinds.values()):
        if "properties" in kind:
            kind["additionalProperties"] = False
    return {**schema, "required": ["apiVersion", "kind", "metadata", "spec"]}
