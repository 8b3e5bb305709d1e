#!/bin/sh
# fetch.sh URI DIRECTORY [SUMS]: copy a checkpoint from an object store, once, checked. Init container of every pod that
# reads it; several on one volume wait for the first. Says each 30 s how far it is.
set -eu
uri=$1 directory=$2 sums=${3:-}
if [ "${NODE_TYPE:-}" = redis-cleanup ]; then
    echo "fetch: nothing, for KubeRay's clean-up of Redis"
    exit 0
fi
case $uri in
    s3://*) source=":s3,provider=AWS,env_auth=true:${uri#s3://}" ;;
    gs://*) source=":gcs,env_auth=true,bucket_policy_only=true:${uri#gs://}" ;;
    *) echo "fetch: $uri is neither s3:// nor gs://" >&2; exit 2 ;;
esac
mkdir -p "$directory"
exec 9> "$directory/.fetch.lock"
flock 9
if [ "$(cat "$directory/.fetched" 2> /dev/null)" = "$uri" ]; then
    echo "fetch: $directory has $uri already"
    exit 0
fi
rm -f "$directory/.fetched"
# What is whole is not copied again: an interrupted fetch goes on. rclone compares each file with the store's own sum.
rclone copy "$source" "$directory" --checksum --transfers 16 --retries 5 --stats 30s --stats-one-line --stats-log-level NOTICE
if [ -n "$sums" ]; then
    if [ ! -f "$directory/$sums" ]; then
        echo "fetch: $uri has no $sums: put one beside the files (sha256sum * > $sums), or set checkpoint.fetch.checksums to ''" >&2
        exit 1
    fi
    if ! wrong=$(cd "$directory" && sha256sum -c "$sums" 2>&1); then
        printf '%s\n' "$wrong" | grep -v ': OK$' >&2
        echo "fetch: $directory is not what $uri/$sums says" >&2
        exit 1
    fi
fi
echo "$uri" > "$directory/.fetched"
echo "fetch: $directory has $uri"
