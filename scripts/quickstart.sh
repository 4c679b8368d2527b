#!/usr/bin/env bash
# From a fresh machine to a trained, evaluated and sampled model, with no download of data.
#
#   scripts/quickstart.sh [JOB_LOG_DIR] [main.py arguments]        (quickstart_run)
#
# Run again, it goes on where it stopped, and skips what is done.
# Environment: PYTHON and VENV, as in setup_env.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

main() {
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then
        sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        return
    fi
    dir=quickstart_run
    if [[ $# -gt 0 && $1 != -* ]]; then
        dir=$1
        shift
    fi
    if ! mkdir -p "$dir/data" 2> /dev/null || [[ ! -w $dir/data ]]; then die "cannot write to $dir"; fi
    dir=$(cd "$dir" && pwd)
    data=$dir/data
    arguments=("$@")
    if [[ -n ${VENV:-} && $VENV != /* ]]; then VENV=$PWD/$VENV; fi
    export VENV=${VENV:-$root/.venv}
    cd "$root"
    source scripts/lib/malloc.sh

    trap 'exit 143' TERM # only after what runs has saved

    heading "1/6 environment"
    scripts/setup_env.sh run
    echo "$VENV"

    heading "2/6 text: the library sources and documentation of this Python"
    make_once "$data/heldout.jsonl" python -m paxlike.data.stdlib_text --output "$data"

    heading "3/6 tokenizer"
    make_once "$data/sentencepiece.model" python -m paxlike.data.train_tokenizer \
        --input "$data/train.jsonl" --vocab_size 4096 --output "$data/sentencepiece.model"

    heading "4/6 training"
    quickstart --mode=train

    heading "5/6 evaluation on held-out files"
    do_once evaluated quickstart --mode=eval

    heading "6/6 samples"
    do_once sampled quickstart --mode=decode \
        --prompt="def " --prompt="class " --prompt="import os" --prompt="The following example"

    # "loss entropy bits" of the newest evaluation
    read -r loss entropy bits < <(python - "$dir"/eval_out/HeldOut/*.json <<- 'END'
	import json, sys
	metrics = json.load(open(sys.argv[-1]))["metrics"]
	print(*(f"{metrics[name]['value']:.3f}" for name in ("loss", "unigram_entropy", "bits_per_byte")))
	END
    )
    python -m paxlike.log.plot "$dir" --output "$dir/loss.png" --title "configs.gpt.Quickstart" \
        --reference "unigram entropy=$entropy" > /dev/null
    heading "ready"
    echo "held-out loss $loss nats per token = $bits bits per byte; unigram entropy $entropy"
    echo "checkpoint    $dir/checkpoints/$(newest_checkpoint)"
    echo "TensorBoard   $dir/summaries"
    echo "loss curve    $dir/loss.png"
}

die() { echo "quickstart.sh: $*" >&2; exit 1; }
heading() { printf '\n== %s\n' "$*"; }
python() { "$VENV/bin/python" "$@"; }

quickstart() {
    VOCAB_PATH=$data/sentencepiece.model python main.py --fdl_config=configs.gpt.Quickstart \
        --job_log_dir="$dir" --fdl.TRAIN_FILES="$data/train.jsonl" \
        --fdl.EVAL_FILES="$data/heldout.jsonl" "$@" "${arguments[@]}"
}

newest_checkpoint() {
    (cd "$dir/checkpoints" 2> /dev/null && ls -d checkpoint_????????) | tail -1
}

# Run the command that writes FILE, unless it is there.
make_once() { # FILE COMMAND...
    if [[ -s $1 ]]; then echo "done before: $1"; else "${@:2}"; fi
}

# Run the command, unless it has been for the newest checkpoint.
do_once() { # NAME COMMAND...
    local done_file=$data/.$1 newest
    newest=$(newest_checkpoint)
    if [[ -e $done_file && $(< "$done_file") == "$newest" ]]; then
        echo "done before, with $newest"
    else
        "${@:2}"
        echo "$newest" > "$done_file"
    fi
}

main "$@"
