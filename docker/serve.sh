#!/bin/sh
# Entry point of the images: razor serve [MODEL] [vLLM options].
#
# Without a model the bundled one is served. The address comes before the caller's
# options, so that those win; exec, so that SIGTERM reaches the server.
set -eu

BUNDLED=/models/needle

case "${1:--}" in
-*)
    set -- --served-model-name needle --razor-window 256 \
        --kv-cache-memory-bytes 536870912 "$@"
    model=$BUNDLED
    ;;
*)
    model=$1
    shift
    ;;
esac

# vLLM's CPU workers are a process of their own that needs 400 MB of shared memory. Docker
# gives 64 MB where it is not told (--shm-size): then the worker lives in the engine's.
if [ "${RAZOR_DEVICE:-}" = cpu ] && [ "$(df -Pk /dev/shm | awk 'END { print $4 }')" -lt 409600 ]; then
    echo "razor-serve: little shared memory, one process for engine and worker" \
        "(--shm-size 1g for two, and for tensor parallelism)"
    export VLLM_ENABLE_V1_MULTIPROCESSING=0
    RAZOR_OPTIONS="${RAZOR_OPTIONS:-} --distributed-executor-backend uni"
fi

# Words of RAZOR_OPTIONS are options of the image, one by one.
# shellcheck disable=SC2086
exec razor serve "$model" --host 0.0.0.0 --port 8000 ${RAZOR_OPTIONS:-} "$@"
