#!/bin/bash
# Prepare a dataset with Slurm arrays:  bash data/slurm_prepare.sh prepare.yaml [survey tasks] [encode tasks]
#
# Four jobs, each begun when the one before ended well. `out` of prepare.yaml must lie where all nodes see it. A task that
# failed is run again alone, and the steps after it then as one task each:
#     sbatch --array=17 data/slurm_prepare.sh --task encode prepare.yaml 64 && sbatch ... --task finish prepare.yaml 1
# Account, partition and the like go into SBATCH_ACCOUNT, SBATCH_PARTITION; CPUS and TIME are those of a task; PYTHON is
# the interpreter.
set -euo pipefail

step() { # in a job: do this task's share
    exec "${PYTHON:-python}" -m grist_data.spread "$1" --config "$2" \
        --rank "${SLURM_ARRAY_TASK_ID:-0}" --world "$3"
}

submit() { # submit STEP TASKS [JOB BEFORE]: prints the number of the job
    local array=() after=()
    [ "$2" -gt 1 ] && array=(--array "0-$(($2 - 1))")
    [ -n "${3:-}" ] && after=(--dependency "afterok:$3" --kill-on-invalid-dep=yes)
    sbatch --parsable --job-name "grist-$1" --cpus-per-task "${CPUS:-8}" --time "${TIME:-04:00:00}" \
        "${array[@]}" "${after[@]}" "$0" --task "$1" "$config" "$2"
}

if [ "${1:-}" = --task ]; then
    step "$2" "$3" "$4"
fi

config=$(realpath "${1:?give the YAML file of the settings}")
surveyed=$(submit survey "${2:-16}")
planned=$(submit plan 1 "$surveyed")
encoded=$(submit encode "${3:-64}" "$planned")
finished=$(submit finish 1 "$encoded")
echo "survey $surveyed, plan $planned, encode $encoded, finish $finished"
