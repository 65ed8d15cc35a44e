#!/bin/sh
# Build an image and try it, from the repository's folder: docker/check.sh [cpu|cuda]
#
# Starts it as docs/deploy.md does, with a read-only root; waits until its health check
# is content; asks one question; looks at its user and its root; stops it. Then once more
# with a model and options of the caller's.
#
#   ENGINE          docker, or what takes its commands
#   BUILD_OPTIONS   words for `build`
#   RUN_OPTIONS     words for `run`
#   PORT            a free port of this machine, 8000 by default
set -eu

ENGINE=${ENGINE:-docker}
KIND=${1:-cpu}
PORT=${PORT:-8000}
IMAGE=razor-vllm:$KIND
NAME=razor-check
SECONDS_TO_START=600

fail() {
    echo "check: $1" >&2
    $ENGINE logs --tail 40 "$NAME" >&2 || true
    exit 1
}

# Words on purpose: $ENGINE and the options may hold several.
# shellcheck disable=SC2086
start() {
    $ENGINE run --detach --name "$NAME" --read-only --tmpfs /tmp --volume "$NAME:/cache" \
        --publish "127.0.0.1:$PORT:8000" ${RUN_OPTIONS:-} "$IMAGE" "$@" >/dev/null
}

health() {
    case $ENGINE in
    podman*) $ENGINE healthcheck run "$NAME" >/dev/null 2>&1 ;;
    *) [ "$($ENGINE inspect --format '{{.State.Health.Status}}' "$NAME")" = healthy ] ;;
    esac
}

wait_until_healthy() {
    waited=0
    until health; do
        [ "$($ENGINE inspect --format '{{.State.Running}}' "$NAME")" = true ] || fail "it ended"
        [ "$waited" -lt "$SECONDS_TO_START" ] || fail "not healthy in $SECONDS_TO_START s"
        sleep 2
        waited=$((waited + 2))
    done
    echo "check: healthy"
}

ask() {
    answer=$(curl --silent --show-error --fail "http://127.0.0.1:$PORT/v1/chat/completions" \
        --header 'Content-Type: application/json' \
        --data "{\"model\": \"$1\", \"max_tokens\": 8, \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}") ||
        fail "no answer"
    case $answer in
    *'"finish_reason"'*) echo "check: $1 answered" ;;
    *) fail "a strange answer: $answer" ;;
    esac
}

stop() {
    $ENGINE stop --time 60 "$NAME" >/dev/null
    status=$($ENGINE inspect --format '{{.State.ExitCode}}' "$NAME")
    [ "$status" -eq 0 ] || fail "exit status $status after SIGTERM"
    $ENGINE rm "$NAME" >/dev/null
    echo "check: stopped by SIGTERM, status 0"
}

clean_up() {
    $ENGINE rm --force "$NAME" >/dev/null 2>&1 || true
    $ENGINE volume rm --force "$NAME" >/dev/null 2>&1 || true
}

# Podman's own format, OCI, has no health check.
case $ENGINE in
podman*) BUILD_OPTIONS="--format docker ${BUILD_OPTIONS:-}" ;;
esac

# shellcheck disable=SC2086
$ENGINE build ${BUILD_OPTIONS:-} --file "docker/Dockerfile.$KIND" --tag "$IMAGE" .
clean_up
trap clean_up EXIT

start
wait_until_healthy
ask needle
[ "$($ENGINE exec "$NAME" id -u)" -eq 10001 ] || fail "it runs as another user"
! $ENGINE exec "$NAME" touch /models/file 2>/dev/null || fail "its root can be written"
stop

start /models/needle --served-model-name another --kv-cache-memory-bytes 268435456 \
    --max-model-len 2048
wait_until_healthy
ask another
stop
echo "check: $IMAGE works"
