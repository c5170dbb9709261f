// Bundles the page to one file: node build.mjs [TARGET]
import { createHash } from 'node:crypto'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { build } from 'esbuild'

const target = process.argv[2] ?? '../src/torchparams/page/page.html'
const bundled = await build({
  entryPoints: ['src/main.ts', 'src/style.css'],
  bundle: true,
  minify: true,
  format: 'iife',
  target: ['chrome111', 'firefox114', 'safari16.4'],
  charset: 'ascii',
  legalComments: 'none',
  write: false,
  metafile: true,
  outdir: 'out',
})
const text = (ending) => bundled.outputFiles.find((file) => file.path.endsWith(ending)).text.trim()
const script = text('.js').replaceAll('</script', '<\\/script')
const style = text('.css')
const hash = (source) => `'sha256-${createHash('sha256').update(source).digest('base64')}'`
// Nothing is loaded, from anywhere: the one script and the one style are those of these digests, and no text becomes
// markup, whoever asks for it.
const csp = `default-src 'none'; script-src ${hash(script)}; style-src ${hash(style)}; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'`
// The licences of what is bundled go with it.
const packages = new Set(Object.keys(bundled.metafile.inputs).flatMap((path) => /node_modules\/([^/]+)/.exec(path)?.[1] ?? []))
const texts = new Map()
for (const name of [...packages].sort()) {
  const file = `node_modules/${name}/LICENSE`
  if (!existsSync(file)) throw new Error(`${name} has no licence`)
  const said = readFileSync(file, 'utf8').trim()
  texts.set(said, [...(texts.get(said) ?? []), name])
}
const licences = [...texts].map(([said, names]) => `${names.join(', ')}\n${said}`).join('\n\n').replaceAll('--', '- -')
const parts = { csp, style, script, licences }
const page = readFileSync('src/page.html', 'utf8').replace(/\{\{(\w+)\}\}/g, (_, part) => parts[part])
if (page.split('<!--data-->').length !== 2) throw new Error('the page has one place for its data')
writeFileSync(target, page)
console.log(`${target}: ${(page.length / 1024).toFixed(0)} KiB`)
