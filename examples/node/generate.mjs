// Streams one answer and verifies every token's chain digest against the prompt's token ids.
// Usage: node generate.mjs HOST:PORT "prompt"
import { createHash, randomUUID } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import path from 'node:path';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';
import { getProtoPath } from 'google-proto-files';

const [address = '127.0.0.1:50051', prompt = 'Name three colours.'] = process.argv.slice(2);
const here = path.dirname(fileURLToPath(import.meta.url));
const definition = loader.loadSync('stagemesh/v1/generation_service.proto', {
  includeDirs: [path.join(here, '../../protos'), path.join(getProtoPath(), '..')],
  keepCase: true, longs: String, enums: String, defaults: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).stagemesh.v1;
const client = new GenerationService(address, grpc.credentials.createInsecure());

const u32 = (value) => { const bytes = Buffer.alloc(4); bytes.writeUInt32LE(value); return bytes; };
const sha256 = (...parts) => createHash('sha256').update(Buffer.concat(parts)).digest();

// docs/protocol.md §7
function chainStart(requestId, promptIds) {
  const key = Buffer.from(requestId.replaceAll('-', ''), 'hex');
  const digest = sha256(Buffer.concat(promptIds.map(u32)));
  return sha256(Buffer.from('stagemesh.chain.1'), key, u32(promptIds.length), digest).subarray(0, 16);
}

const chat = { messages: [{ role: 'user', content: prompt }] };
const deadline = () => new Date(Date.now() + 120_000);

client.Tokenize({ chat }, { deadline: deadline() }, (error, tokenized) => {
  if (error) { console.error(`${error.code} ${error.details}`); process.exit(1); }
  const requestId = randomUUID();
  let chain = chainStart(requestId, tokenized.token_ids);
  let position = 0;
  const stream = client.Generate({ request_id: requestId, chat, max_tokens: 64 }, { deadline: deadline() });
  stream.on('data', (response) => {
    process.stdout.write(response.text);
    for (const token of response.tokens) {
      chain = sha256(chain, u32(token.position), u32(token.token_id)).subarray(0, 16);
      if (!chain.equals(token.chain)) { console.error('\nchain does not verify'); process.exit(1); }
      position += 1;
    }
    if (response.finish) {
      console.log(`\n${response.finish.reason}, ${position} tokens, every chain link verified, ` +
        `route ${response.finish.route.join(' → ')}, ${response.finish.recoveries.length} recoveries`);
    }
  });
  stream.on('error', (failure) => { console.error(`${failure.code} ${failure.details}`); process.exit(1); });
});
