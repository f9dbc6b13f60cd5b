#!/bin/sh
# A program that is not Python, though it starts one, as many of them do.
printf 'loading:  10%%\rloading: 100%%\n' >&2
echo "rank $RANK of $WORLD_SIZE"
if [ "$2" = fail ] && [ "$RANK" = 1 ] && [ "$TORCHELASTIC_RESTART_COUNT" = 0 ]; then
    echo "no such file: corpus.txt" >&2
    exit 3
fi
exec python -m package.train "$@"
