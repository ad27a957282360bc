#!/usr/bin/env bash
# One process on each host, which all see this directory:
#     docs/launch/ssh.sh "node1 node2" .venv/bin/gdn train table3/gated-deltanet/1.3b --run.fsdp 8 --run.dir run
# Process 0 runs on the first host, and its words come here. Ctrl-C asks all to save and stop. PORT is one free there;
# SSH another program than ssh that takes a host and a command.
set -uo pipefail
hosts=($1) ssh=${SSH:-ssh} here=$(printf %q "$PWD")
shift
address=${hosts[0]}:${PORT:-29400}

stop() { for i in "${!hosts[@]}"; do $ssh "${hosts[i]}" "kill -TERM \$(cat $here/.gdn-$i.pid)"; done; }
trap stop INT TERM

pids=()
for i in "${!hosts[@]}"; do
  variables="JAX_COORDINATOR_ADDRESS=$address JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$i"
  $ssh "${hosts[i]}" "cd $here && echo \$\$ >.gdn-$i.pid && exec env $variables $(printf '%q ' "$@")" &
  pids+=($!)
done

code=0
for pid in "${pids[@]}"; do
  while :; do # a signal interrupts `wait`, not the process
    wait "$pid" && break
    last=$?
    kill -0 "$pid" 2>/dev/null || { code=$last && break; }
  done
done
for i in "${!hosts[@]}"; do rm -f ".gdn-$i.pid"; done
exit "$code"
