#!/usr/bin/env bash
usage="Train in stages, each from the weights of the one before; a rerun goes on where it ended.

usage: pipeline.sh [--skip-pretrain]     (begin with sft, from the weights that pretrain has left)

A stage is a command in the variable of its name, PRETRAIN, SFT, DPO or R1; without one it is the
example, stages.py, and an empty one leaves the stage out. Make it one process: a signal that
ends the pipeline goes to it alone, and the pipeline waits for what it then saves.

  SFT='python tune.py --load \"\$INIT_WEIGHTS\" --resume \"\$RESUME_FROM\"' \\
    mainrun/pipeline/pipeline.sh

Exported to it; a script that observability.py observes reads those below the line by itself:
  STAGE, STAGE_OUT, INIT_WEIGHTS   its name, its directory, the weights of the stage before
  RESUME_FROM     the newest whole checkpoint, for a script that resumes by itself; empty at first
  PYTHONPATH      ends in mainrun/, where observability.py is
  ---
  OBS_RESUME      STAGE_OUT, the run to go on in, when there is a whole checkpoint; the checkpoint
                  itself, when the script has its run elsewhere; or never
  OBS_CKPT_DIR    where to save: out/<stage>/checkpoints
  OBS_WEIGHTS     the plain weights to keep beside them: out/<stage>_<hidden>.pth
  SAVE_INTERVAL   optimizer steps between two checkpoints; auto
  KEEP_LAST       how many are kept; 3

Other variables, with what they are by default:
  STAGES          pretrain sft dpo r1
  HIDDEN          64, the width in the name of the weights
  OUT_DIR         mainrun/out; PRETRAIN_OUT, SFT_OUT, … for the directory of one stage
  PYTHON          python3
  TB_AUTO, TB_HOST, TB_PORT, TF_DIR   1, 127.0.0.1, 6006, mainrun/logs/tb (OUT_DIR/tb where that
                  is given): TensorBoard, as long as the pipeline runs; none with TB_AUTO=0 or an
                  empty TF_DIR

A second pipeline in the same OUT_DIR is refused as long as the first one runs."
set -uo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) MAINRUN=${HERE%/*}
absolute() { case $1 in "" | /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
TF_DIR=$(absolute "${TF_DIR-${OUT_DIR:-$MAINRUN/logs}/tb}")
OUT_DIR=$(absolute "${OUT_DIR:-$MAINRUN/out}")
PYTHON=${PYTHON:-python3} HIDDEN=${HIDDEN:-64}
SAVE_INTERVAL=${SAVE_INTERVAL:-auto} KEEP_LAST=${KEEP_LAST:-3} child="" tensorboard=""
TB_AUTO=${TB_AUTO:-1} TB_HOST=${TB_HOST:-127.0.0.1} TB_PORT=${TB_PORT:-6006}
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$MAINRUN
export HERE OUT_DIR TF_DIR PYTHON HIDDEN SAVE_INTERVAL KEEP_LAST TB_AUTO TB_HOST TB_PORT

# shellcheck disable=SC2016 # the stage's own shell expands it
EXAMPLE='"$PYTHON" "$HERE/stages.py" "$STAGE" --out "$STAGE_OUT" --init "$INIT_WEIGHTS" \
  --hidden "$HIDDEN" --resume "$OBS_RESUME" --ckpt_dir "$OBS_CKPT_DIR" \
  --save_interval "$SAVE_INTERVAL" --keep_last_checkpoints "$KEEP_LAST"'

main() {
  local skipped="" stage
  case "${1:-}" in
    "") ;;
    --skip-pretrain) skipped=pretrain ;;
    -h | --help) echo "$usage" && exit ;;
    *) fail 2 "there is no option $1; see pipeline.sh --help" ;;
  esac
  mkdir -p "$OUT_DIR" || exit 2
  lock
  trap 'end 129' HUP; trap 'end 130' INT; trap 'end 143' TERM; trap stop_tensorboard EXIT
  start_tensorboard
  INIT_WEIGHTS=""
  for stage in ${STAGES:-pretrain sft dpo r1}; do
    if [[ $stage != "$skipped" ]]; then
      [[ -n $(command_of "$stage") ]] || continue
      train "$stage"
    fi
    INIT_WEIGHTS=$(weights_of "$stage") || exit 2
    [[ -n $INIT_WEIGHTS ]] || fail 2 "$stage has left no weights to go on with: neither" \
      "a checkpoint in $(out_of "$stage")/checkpoints nor $(plain_weights_of "$stage")"
  done
  say "all stages are done: $INIT_WEIGHTS"
}

# Held by this shell's open file 9 and gone with it, even by kill -9: no child keeps that open.
lock() {
  local other
  exec 9<>"$OUT_DIR/.pipeline.lock" || exit 2
  other=$("$PYTHON" -c 'import fcntl, os, sys
try: fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: sys.exit(print(os.read(9, 20).decode()) or 3)
os.ftruncate(9, 0); os.write(9, sys.argv[1].encode())' "$$")
  case $? in
    0) ;;
    3) fail 2 "another pipeline (pid $other) is at work in $OUT_DIR; wait for its end, or give" \
      "this one an OUT_DIR of its own" ;;
    *) fail 2 "cannot lock $OUT_DIR/.pipeline.lock; is $PYTHON a Python, and can that disk lock?" ;;
  esac
}

# --- A stage --------------------------------------------------------------------------------------

train() {
  STAGE=$1 STAGE_OUT=$(out_of "$1")
  if [[ -e $STAGE_OUT/done ]]; then
    say "$STAGE is done; to train it again: $PYTHON $MAINRUN/observability.py rm $STAGE_OUT"
    [[ ! $INIT_WEIGHTS -nt $STAGE_OUT/done ]] ||
      say "warning: $STAGE was trained from older weights than $INIT_WEIGHTS"
    return
  fi
  ! is_alive "$STAGE_OUT" || fail 2 "$STAGE is being trained by another process; wait for its end"
  OBS_CKPT_DIR=$STAGE_OUT/checkpoints OBS_WEIGHTS=$(plain_weights_of "$STAGE")
  RESUME_FROM=$(latest_ckpt "$OBS_CKPT_DIR") || exit 2
  if [[ -n $RESUME_FROM ]]; then
    OBS_RESUME=$STAGE_OUT
    [[ -e $STAGE_OUT/config.json ]] || OBS_RESUME=$RESUME_FROM
    say "$STAGE goes on from $RESUME_FROM"
  else
    OBS_RESUME=never
    set_aside
    refuse_anothers_events "${TF_DIR:-$MAINRUN/logs/tb}/${STAGE_OUT##*/}"
    say "$STAGE begins from ${INIT_WEIGHTS:-scratch}"
  fi
  export STAGE STAGE_OUT INIT_WEIGHTS RESUME_FROM OBS_RESUME OBS_CKPT_DIR OBS_WEIGHTS
  run "$(command_of "$STAGE")" || fail "$?" "$STAGE failed with exit code $?;" \
    "run the pipeline again to go on from there"
  mkdir -p "$STAGE_OUT" && touch "$STAGE_OUT/done"
}

# A run that ended before its first checkpoint gives its name free: no other one may have its events.
set_aside() {
  [[ ! -e $STAGE_OUT/.lock ]] || ask 'run = pathlib.Path(sys.argv[1])
aside = f"{run.name}.unsaved-{time.time_ns()}"
try:
  home = obs.RunDirectory.reopen(run)
  there = home.tb_dir.with_name(aside)
  if home.tb_dir.exists(): home.tb_dir.rename(there)
  home.save_config({"run": aside, "tb_dir": os.path.relpath(there, run)})
except (OSError, obs.DamageError): pass  # it was killed at its very beginning
run.rename(run.with_name(aside))' "$STAGE_OUT"
}

# Of a run that was deleted without them, or in another OUT_DIR: the new one would get another name.
refuse_anothers_events() {
  ! compgen -G "$1/*.obs" >/dev/null || fail 2 "$1 has the events of another run; remove it," \
    "or give this pipeline a TF_DIR of its own"
}

# Behind, because bash lets a signal wait until the command in front has ended.
run() {
  bash -c "$1" 9>&- & child=$!
  wait "$child" && child=""
}

# A signal: the stage gets it as SIGTERM and may save; a second one ends an observed stage at once.
end() {
  if [[ -n $child ]] && kill -TERM "$child" 2>/dev/null; then
    say "stopping $STAGE; run the pipeline again to go on from there"
    wait "$child"
  fi
  exit "$1"
}

weights_of() {
  local newest plain
  newest=$(latest_ckpt "$(out_of "$1")/checkpoints") || return
  plain=$(plain_weights_of "$1")
  if [[ -n $newest ]]; then echo "$newest/model.pth"; elif [[ -e $plain ]]; then echo "$plain"; fi
}

command_of() { local name; name=$(upper "$1"); echo "${!name-$EXAMPLE}"; }
out_of() { local name; name=$(upper "$1")_OUT; absolute "${!name:-$OUT_DIR/$1}"; }
plain_weights_of() { echo "$OUT_DIR/$1_$HIDDEN.pth"; }

# The newest whose every byte checks, or nothing where there is none; fails where all are damaged.
latest_ckpt() {
  ask 'try: print(obs.latest_ckpt(sys.argv[1]) or "")
except obs.CheckpointError as error: sys.exit(f"pipeline: {error}")' "$1"
}

is_alive() { ask 'sys.exit(not obs.alive(pathlib.Path(sys.argv[1])))' "$1"; }
ask() { PYTHONPATH=$MAINRUN "$PYTHON" -c "import os, pathlib, sys, time; import observability as obs
$1" "$2" 9>&-; }

# --- TensorBoard and messages ---------------------------------------------------------------------

start_tensorboard() {
  [[ $TB_AUTO != 0 && -n $TF_DIR ]] || return
  ask 'import importlib.util; sys.exit(not importlib.util.find_spec(sys.argv[1]))' tensorboard ||
    { say "warning: no TensorBoard; to get it: $PYTHON -m pip install tensorboard" && return; }
  while (: <>"/dev/tcp/$TB_HOST/$TB_PORT") 2>/dev/null; do ((TB_PORT++)); done # taken by another
  "$PYTHON" -m tensorboard.main --logdir "$TF_DIR" --host "$TB_HOST" --port "$TB_PORT" \
    >"$OUT_DIR/tensorboard.log" 2>&1 9>&- &
  tensorboard=$!
  say "TensorBoard (pid $tensorboard) on http://$TB_HOST:$TB_PORT until the pipeline ends"
}

stop_tensorboard() {
  [[ -z $tensorboard ]] || { kill "$tensorboard" && wait "$tensorboard"; } 2>/dev/null
}
upper() { tr '[:lower:]-' '[:upper:]_' <<<"$1"; }
say() { echo "pipeline: $*"; }
fail() { local status=$1; echo "pipeline: ${*:2}" >&2; exit "$status"; }

main "$@"
