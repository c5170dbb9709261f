/** A text that is no selector, or one that asks for what the table does not record. */
export class SelectorError extends Error {
  /** `column` counts characters from 1; 0 where the text itself is fine. */
  constructor(
    message: string,
    readonly column = 0,
    readonly expected = '',
    readonly hint = '',
  ) {
    super(message)
  }
}
