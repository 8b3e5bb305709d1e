-- What the scripts share. The arithmetic is that of sliding_window.py and quotas.py.
-- KEYS: state (hash), buckets (list of the window's bucket numbers, ascending), leases (sorted set, by their end).
-- Fields of state: R, T: requests and tokens in the window; r<b>, t<b>: in one bucket; m<month>: tokens of a month;
-- o<id>: an open reservation, "requests tokens bucket month used".
local state, buckets, leases = KEYS[1], KEYS[2], KEYS[3]
local BUCKET_US, NUM_BUCKETS = 100000, 600
local KEEP_S = 100 * 86400 -- longer than a month: a tenant that was silent for so long has nothing left that counts
local FORGOTTEN_US = 600 * 1000000 -- a lease that ended so long ago is settled for its holder

local now_us
if ARGV[1] == '' then
  local time = redis.call('TIME') -- the server's clock: one for all ingresses
  now_us = time[1] * 1000000 + time[2]
else
  now_us = tonumber(ARGV[1])
end
local bucket = math.floor(now_us / BUCKET_US)

local function int(number) return string.format('%.0f', number) end
local function get(field) return tonumber(redis.call('HGET', state, field) or 0) end
local function add(field, number)
  if number ~= 0 then redis.call('HINCRBY', state, field, int(number)) end
end

-- Take a bucket's counts out of the window and return them; whoever calls removes it from the list.
local function take_out(index)
  local requests, tokens = get('r' .. index), get('t' .. index)
  redis.call('HDEL', state, 'r' .. index, 't' .. index)
  add('R', -requests)
  add('T', -tokens)
  return requests, tokens
end

local function put_in(index, requests, tokens)
  if redis.call('LINDEX', buckets, -1) ~= int(index) then redis.call('RPUSH', buckets, int(index)) end
  -- Also a zero must be there: it says that the bucket is.
  redis.call('HINCRBY', state, 'r' .. int(index), int(requests))
  add('t' .. int(index), tokens)
  add('R', requests)
  add('T', tokens)
end

local function forget()
  while true do
    local first = redis.call('LINDEX', buckets, 0)
    if not first or tonumber(first) >= bucket - NUM_BUCKETS then break end
    redis.call('LPOP', buckets)
    take_out(first)
  end
  local last = redis.call('LINDEX', buckets, -1)
  if last and tonumber(last) > bucket then -- the clock was set back
    local requests, tokens = 0, 0
    while last and tonumber(last) >= bucket do
      redis.call('RPOP', buckets)
      local more_requests, more_tokens = take_out(last)
      requests, tokens = requests + more_requests, tokens + more_tokens
      last = redis.call('LINDEX', buckets, -1)
    end
    put_in(bucket, requests, tokens)
  end
end

-- Calendar month in UTC, as 202611. Source: H. Hinnant, chrono-compatible low-level date algorithms (civil_from_days).
local function month_of(us)
  local days = math.floor(us / 86400000000) + 719468
  local era = math.floor(days / 146097)
  local day = days - era * 146097
  local year = math.floor(
    (day - math.floor(day / 1460) + math.floor(day / 36524) - math.floor(day / 146096)) / 365)
  local day_of_year = day - (365 * year + math.floor(year / 4) - math.floor(year / 100))
  local shifted = math.floor((5 * day_of_year + 2) / 153)
  local month = shifted < 10 and shifted + 3 or shifted - 9
  return (year + era * 400 + (month <= 2 and 1 or 0)) * 100 + month
end

-- Close a reservation: correct what it took. Only the first time does anything.
local function close(id, keeps_request, tokens)
  local open = redis.call('HGET', state, 'o' .. id)
  redis.call('ZREM', leases, id)
  if not open then return 0 end
  redis.call('HDEL', state, 'o' .. id)
  local had_requests, had_tokens, index, month, used = string.match(open, '(%d+) (%d+) (%d+) (%d+) (%d+)')
  local requests = keeps_request and 0 or -had_requests
  local difference = (tonumber(tokens) or tonumber(used)) - had_tokens
  if redis.call('HEXISTS', state, 'r' .. index) == 1 then
    add('r' .. index, requests)
    add('R', requests)
    add('t' .. index, difference)
    add('T', difference)
  end
  if redis.call('HEXISTS', state, 'm' .. month) == 1 then add('m' .. month, difference) end
  return 1
end
