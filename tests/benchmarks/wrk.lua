-- Tells wrk what to send, and prints what it found as one line of JSON.

function init(args)
   if args[1] == "upload" then
      wrk.method = "POST"
      wrk.body = string.rep("x", 1048576)
      wrk.headers["Content-Type"] = "application/octet-stream"
   end
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "bytes": %d, '
      .. '"bad_status": %d, "broken": %d, "timed_out": %d}\n',
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
      summary.bytes, errors.status, errors.connect + errors.read + errors.write, errors.timeout
   ))
end
