-- Posts the files named after `--` by turns, again and again; ends with one line of JSON for load_tests/generators.py.
-- With `pause=MILLISECONDS` before the files each connection pauses so long, on average, before each request.
local requests, turn = {}, 0

function init(arguments)
  wrk.method = "POST"
  for _, argument in ipairs(arguments) do
    local mean = argument:match("^pause=(.+)$")
    if mean then
      -- wrk pauses where there is a function of this name.
      function delay()
        return math.floor(-mean * math.log(1 - math.random()) + 0.5)
      end
    else
      local file = assert(io.open(argument, "rb"))
      requests[#requests + 1] = wrk.format(nil, nil, nil, file:read("*a"))
      file:close()
    end
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "p50_ms": %f, "p95_ms": %f, "p99_ms": %f, "not_ok": %d, "socket_errors": %d}\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
