// The noise contract, docs/noise.md, outside Python: whoever can multiply 64-bit numbers can make a sample's noise.
// The numbers in parentheses are the steps of its definition. For browsers and Node, without dependencies.

const MASK = 2n ** 64n - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

/** Philox 4x64-10: the four 64-bit words of a 256-bit counter under the key (seed, 0). */
function philox(counter, seed) {
  let [a, b, c, d] = [0n, 64n, 128n, 192n].map((shift) => (counter >> shift) & MASK);
  let [key0, key1] = [seed, 0n];
  for (let round = 0; round < 10; round += 1) {
    const [left, right] = [a * MULTIPLIERS[0], c * MULTIPLIERS[1]]; // 128 bits each
    [a, b, c, d] = [(right >> 64n) ^ b ^ key0, right & MASK, (left >> 64n) ^ d ^ key1, left & MASK];
    [key0, key1] = [(key0 + WEYL[0]) & MASK, (key1 + WEYL[1]) & MASK];
  }
  return [a, b, c, d];
}

/** The word's 53 high bits as a number between 0 and 1, never either (3). */
const uniform = (word) => (Number(word >> 11n) + 0.5) * 2 ** -53;

/** The noise of samples start to start + count - 1: a Float32Array of count * size values. Seed and start are BigInts. */
export function draw(seed, start, count, size) {
  const noise = new Float32Array(count * size); // rounds to float32 what is put into it (5)
  const blocks = Math.ceil(size / 4); // W / 4 (1)
  for (let sample = 0; sample < count; sample += 1) {
    const before = (start + BigInt(sample)) * BigInt(blocks);
    for (let block = 0; block < blocks; block += 1) {
      const words = philox(before + BigInt(block) + 1n, seed).map(uniform); // stepped before each block (2)
      for (const pair of [0, 2]) {
        const radius = Math.sqrt(-2 * Math.log(words[pair]));
        const angle = 2 * Math.PI * words[pair + 1];
        const at = 4 * block + pair; // (4)
        if (at < size) noise[sample * size + at] = radius * Math.cos(angle);
        if (at + 1 < size) noise[sample * size + at + 1] = radius * Math.sin(angle);
      }
    }
  }
  return noise;
}

/** The way from one sample's noise to another's along the great circle, both ends among its steps; as serve.noise.between. */
export function between(first, last, steps) {
  const size = first.length;
  const dot = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);
  const [a, b] = [Float64Array.from(first), Float64Array.from(last)];
  const lengths = Math.sqrt(dot(a, a)) * Math.sqrt(dot(b, b));
  const angle = lengths ? Math.acos(Math.min(1, Math.max(-1, dot(a, b) / lengths))) : 0;
  const straight = Math.sin(angle) < 1e-6; // there is no one great circle
  const way = new Float32Array(steps * size);
  for (let step = 0; step < steps; step += 1) {
    const at = step / (steps - 1);
    const [from, to] = straight ? [1 - at, at] : [1 - at, at].map((part) => Math.sin(part * angle) / Math.sin(angle));
    for (let each = 0; each < size; each += 1) way[step * size + each] = from * a[each] + to * b[each];
  }
  way.set(first, 0);
  way.set(last, (steps - 1) * size);
  return way;
}
